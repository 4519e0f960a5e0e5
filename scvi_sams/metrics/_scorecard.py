"""Models beside the baselines they must beat and the ceiling that the data set."""

from __future__ import annotations

__all__ = ["scorecard"]

from collections.abc import Mapping
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics._cell_groups import CellGroups
from scvi_sams.metrics._scorecard_core import ScoreSettings, score_cells, scored_conditions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scvi_sams.metrics._baselines import Baseline
    from scvi_sams.metrics._scorecard_report import Scorecard
    from scvi_sams.model._perturbation_vae import PerturbationVAE

_CELLS_OF_DISTANCES = 200  # simulated of a condition


def scorecard(
    model: PerturbationVAE | Mapping[str, PerturbationVAE],
    adata: ad.AnnData | None = None,
    test_indices: Sequence[int] | NDArray[np.int64] | None = None,
    *,
    conditions: Sequence[str] | None = None,
    baselines: Sequence[Baseline] | None = None,
    cell_level: bool = True,
    min_cells: int = 10,
    n_top_genes: int = 20,
    n_samples: int = 25,
    n_bootstrap: int = 1_000,
    seed: int = 0,
) -> Scorecard:
    """Score a model beside the simple baselines and the ceiling, on cells it has not seen.

    Baselines are fitted on the training cells of the model, in the same unit, against the same
    controls. Held-out cells of conditions that were trained on ask whether the model describes a
    condition; held-out conditions ask whether it predicts.

    Parameters
    ----------
    model
        A trained model of this package; or several by name, trained on the same cells, which come
        into one table.
    adata
        Held-out cells, laid out as what the model was set up with; by default that AnnData.
    test_indices
        Cells of ``adata`` to score on. By default ``model.test_indices``, or
        ``model.validation_indices`` where there are none, or all cells of another AnnData.
    conditions
        Conditions to score (``"A"``, ``"A+B"``); by default all with at least ``min_cells``
        held-out cells.
    baselines
        Baselines, not fitted yet. By default all of this package that apply to a condition that is
        scored.
    cell_level
        Whether to simulate cells for the energy distance.
    min_cells
        Held-out cells that a condition needs, at least 4.
    n_top_genes
        Genes that count as the strongest of a condition.
    n_samples
        Draws of masks and effects behind the model's means and intervals.
    n_bootstrap
        Draws of conditions for intervals.
    seed
        Seed of the model's draws, of halves and of the bootstrap.

    Returns
    -------
    The scorecard: means of each predictor and measure with intervals, scores by condition, and a
    verdict that says which baseline wins where.

    Raises
    ------
    ScreenError
        If there are no held-out cells, some of them were trained on, no condition has enough of
        them, there are no training controls, or models were trained on different cells.
    ValueError
        If a setting makes no sense, or a model has no count likelihood.

    Notes
    -----
    See :func:`score_predictions`, which has the same scores for the effects of
    ``model.get_average_treatment_effect`` and, for the energy distance, the cells of
    ``model.predict``. A prediction without variation has a correlation of 0.

    A baseline has no cells of its own: for the energy distance, training controls are moved by
    the effect that it predicts. The ceiling ``split half`` is an experiment of half the size,
    which a good model can pass. ``bootstrap`` bounds from above what the exact truth would score;
    for correlations of weak effects it is far above. Coverage adds the standard error of the
    observed mean to the posterior of the effect: that of masks and embeddings, not of the
    networks' weights.

    Examples
    --------
    >>> card = scvi_sams.metrics.scorecard(model)  # doctest: +SKIP
    >>> print(card)  # doctest: +SKIP
    """
    models = dict(model) if isinstance(model, Mapping) else {type(model).__name__: model}
    if not models:
        raise ValueError("`model` is empty: give one, or several by name.")
    first = next(iter(models.values()))
    for name, other in models.items():
        if other.train_indices is None:
            raise ScreenError(f"{name} is not trained: call train() first.")
        if other.adata is None:
            raise ScreenError(f"{name} was loaded without its AnnData: load it with its AnnData.")
        if not np.array_equal(_training_indices(other), _training_indices(first)):
            raise ScreenError(f"{name} was trained on other cells than the first model.")
    cells = first.adata if adata is None else adata
    indices = _held_out_indices(first, cells, test_indices)
    training = _registered_cells(first, first.adata, _training_indices(first))
    held_out = _registered_cells(first, cells, indices)
    if cells is not first.adata:
        _check_other_cells(held_out.adata, training.adata)

    wanted = scored_conditions(held_out, conditions, min_cells)
    doses = dict(zip(held_out.conditions, held_out.doses, strict=True))
    doses |= dict(zip(training.conditions, training.doses, strict=True))
    delimiter = first.registry["setup_args"].get("combination_delimiter")
    predictions, predicted_cells = {}, {}
    # Perturbations alone are asked for too: what combinations do beyond them is scored.
    asked = [*wanted, *_parts_alone(wanted, doses, training)]
    for name, other in models.items():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            effects = other.get_average_treatment_effect(
                [doses[condition] for condition in asked],
                method="log_normalized",
                n_samples=n_samples,
            )
            effects.obs_names = asked
            predictions[name] = effects
            if cell_level:
                simulated = other.predict(
                    [doses[condition] for condition in wanted], n_samples=_CELLS_OF_DISTANCES
                )
                # In the order asked for, and named as the conditions are here.
                simulated.obs["condition"] = np.repeat(wanted, _CELLS_OF_DISTANCES)
                predicted_cells[name] = simulated
    return score_cells(
        predictions,
        held_out,
        training,
        conditions=wanted,
        combination_delimiter=delimiter,
        baselines=baselines,
        predicted_cells=predicted_cells,
        settings=ScoreSettings(min_cells, n_top_genes, n_bootstrap, seed),
        provenance={
            "model": ", ".join(type(other).__name__ for other in models.values()),
            "n_samples": n_samples,
        },
    )


def _training_indices(model: PerturbationVAE) -> NDArray[np.int64]:
    return np.sort(np.asarray(model.train_indices, dtype=np.int64))


def _held_out_indices(
    model: PerturbationVAE,
    adata: ad.AnnData,
    test_indices: Sequence[int] | NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """Cells to score on, none of them trained on."""
    own = adata is model.adata
    if test_indices is None:
        if not own:
            return np.arange(adata.n_obs)
        for held_out in (model.test_indices, model.validation_indices):
            if held_out is not None and len(held_out):
                return np.sort(np.asarray(held_out, dtype=np.int64))
        raise ScreenError(
            "The model was trained on all its cells: give `adata` with others, or train with a "
            "`train_size` below 1."
        )
    indices = np.asarray(test_indices)
    if indices.dtype == bool and indices.shape == (adata.n_obs,):
        indices = np.flatnonzero(indices)
    if not indices.size or indices.dtype.kind not in "iu":
        raise ValueError("`test_indices` must be positions of cells, at least one.")
    if indices.min() < 0 or indices.max() >= adata.n_obs:
        raise ValueError(f"`test_indices` must lie between 0 and {adata.n_obs - 1}.")
    indices = np.unique(indices).astype(np.int64)
    if own and (seen := np.intersect1d(indices, _training_indices(model))).size:
        raise ScreenError(
            f"{seen.size} of `test_indices` were trained on, the first cell "
            f"{adata.obs_names[seen[0]]!r}: score on others."
        )
    return indices


def _registered_cells(
    model: PerturbationVAE, adata: ad.AnnData, indices: NDArray[np.int64]
) -> CellGroups:
    """Cells with the doses, batches and library sizes that the model reads of them."""
    adata = model._validate_anndata(adata)
    manager = model.get_anndata_manager(adata, required=True)
    setup = model.registry["setup_args"]
    keys = [setup.get(name) for name in ("batch_key", "size_factor_key")]
    cells = ad.AnnData(
        manager.get_from_registry(REGISTRY_KEYS.X_KEY)[indices],
        obs=adata.obs.iloc[indices][[key for key in dict.fromkeys(keys) if key is not None]],
        var=pd.DataFrame(index=adata.var_names),
    )
    dosage = manager.get_from_registry(SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
    return CellGroups.from_dosage(
        cells,
        sp.csr_matrix(dosage[indices]),
        model.perturbation_names,
        setup.get("control"),
        batch_key=keys[0],
        size_factor_key=keys[1],
        combination_delimiter=setup.get("combination_delimiter"),
    )


def _parts_alone(
    conditions: Sequence[str], doses: Mapping[str, dict[str, float]], training: CellGroups
) -> list[str]:
    """Conditions of one perturbation each that scored combinations are made of."""
    needed = {
        part
        for condition in conditions
        if len(doses[condition]) > 1
        for part in doses[condition].items()
    }
    return [
        str(name)
        for name, of_it in zip(training.conditions, training.doses, strict=True)
        if len(of_it) == 1 and needed.issuperset(of_it.items()) and name not in conditions
    ]


def _check_other_cells(held_out: ad.AnnData, training: ad.AnnData) -> None:
    """Raise if a cell was trained on: the same name and the same counts."""
    common = held_out.obs_names.intersection(training.obs_names)
    if not common.size or not common.is_unique:
        return
    difference = held_out[common].X - training[common, held_out.var_names].X
    same = np.asarray(abs(difference).sum(axis=1)).ravel() == 0
    if same.any():
        raise ScreenError(
            f"{same.sum()} cells of `adata` were trained on, the first {common[same.argmax()]!r}: "
            "leave them out."
        )
