"""Scores of any predictions beside the baselines and the ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_sams.data import Conditions
from scvi_sams.data.conditions import as_labels, split_label
from scvi_sams.evaluation._observed import CellGroups, _obs_column
from scvi_sams.evaluation._scorecard import ScoreSettings, score_cells

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import anndata as ad

    from scvi_sams.data.tables import ProfileTable
    from scvi_sams.evaluation._baselines import Baseline
    from scvi_sams.evaluation._scorecard_report import Scorecard

__all__ = ["score_predictions"]


def score_predictions(
    predictions: Mapping[str, ProfileTable],
    held_out: ad.AnnData,
    training: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    batch_key: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    combination_delimiter: str | None = "+",
    *,
    conditions: Sequence[str] | None = None,
    baselines: Sequence[Baseline] | None = None,
    predicted_cells: Mapping[str, ad.AnnData] | None = None,
    min_cells: int = 10,
    n_top_genes: int = 20,
    n_bootstrap: int = 1_000,
    seed: int = 0,
) -> Scorecard:
    r"""Score any predictions beside the baselines and the ceiling.

    All is in one unit, effects in :math:`\log_2(1 + 10^4 x / l)` against the controls of the same
    batch (:func:`batch_matched_treatment_effect`). Baselines are fitted on the training cells, and
    the held-out cells are used to score alone. For models of this package see :func:`scorecard`.

    Parameters
    ----------
    predictions
        Effects of each predictor, conditions x genes, with every condition that is scored and
        every gene. A condition that a predictor leaves open is NaN; it is then left out of the
        predictor's means, and a note says so. Perturbations alone are used for interactions if
        they are there. ``layers["std"]`` of an AnnData, the posterior standard deviation of the
        expected effect, gives coverage.
    held_out, training
        Cells x genes, with counts: the cells that are scored against, and those that every
        predictor was fitted on. They may share no cell.
    perturbation_key, control, batch_key, layer, size_factor_key, combination_delimiter
        As for :func:`batch_matched_treatment_effect`, the same for both.
    conditions
        Conditions to score; by default all with at least ``min_cells`` held-out cells.
    baselines
        Baselines, not fitted yet. By default all of this package that apply to a condition that is
        scored.
    predicted_cells
        Counts of simulated cells of predictors, with ``obs["condition"]`` and
        ``obs["library_size"]`` as from ``model.predict``, for the energy distance.
    min_cells
        Held-out cells that a condition needs, at least 4.
    n_top_genes
        Genes that count as the strongest of a condition.
    n_bootstrap
        Draws of conditions for intervals.
    seed
        Seed of halves and of draws.

    Returns
    -------
    The scorecard.

    Raises
    ------
    ScreenError
        If no condition has enough held-out cells, a prediction lacks a condition or gene, there
        are no training controls, or a column or label is not there.
    ValueError
        If a setting makes no sense, or a predictor is called like a baseline or ceiling.

    Notes
    -----
    The table of baselines and ceilings follows Ahlmann-Eltze, Huber and Anders (Nature Methods
    2025) and Mejia et al. (arXiv 2506.22641). Where at least ten controls are held out, effects
    are against these, so that the noise of the training controls, which is in every prediction,
    does not look like agreement.

    Examples
    --------
    >>> import scvi_sams
    >>> from scvi_sams.evaluation import batch_matched_treatment_effect, score_predictions
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=2_000, n_perturbations=8, n_pairs=2)
    >>> training, held_out = adata[::2].copy(), adata[1::2].copy()
    >>> halved = batch_matched_treatment_effect(training, "perturbation", "control")
    >>> halved.X *= 0.5
    >>> card = score_predictions(
    ...     {"half": halved}, held_out, training, "perturbation", "control", min_cells=20
    ... )
    >>> card.comparison.loc[("half", "relative_squared_error"), "outcome"]
    'behind'
    """
    arguments = (batch_key, layer, size_factor_key, combination_delimiter)
    learned = CellGroups.read(training, perturbation_key, control, *arguments)
    if _has_controls(held_out, perturbation_key, control):
        scored = CellGroups.read(held_out, perturbation_key, control, *arguments)
    else:  # as where conditions are held out
        names = _parts(held_out, perturbation_key, combination_delimiter)
        doses = Conditions.from_labels(
            held_out.obs[perturbation_key], None, combination_delimiter, perturbations=names
        )
        scored = CellGroups.from_dosage(held_out, doses.cell_matrix, names, control, *arguments)
    return score_cells(
        predictions,
        scored,
        learned,
        conditions=conditions,
        combination_delimiter=combination_delimiter,
        baselines=baselines,
        predicted_cells=predicted_cells or {},
        settings=ScoreSettings(min_cells, n_top_genes, n_bootstrap, seed),
    )


def _has_controls(adata: ad.AnnData, perturbation_key: str, control: str | Sequence[str]) -> bool:
    labels = _obs_column(adata, perturbation_key).astype(str).str.strip()
    return bool(labels.isin(as_labels(control)).any())


def _parts(adata: ad.AnnData, perturbation_key: str, delimiter: str | None) -> list[str]:
    labels = adata.obs[perturbation_key].dropna().astype(str).unique()
    return sorted({part for label in labels for part in split_label(label, delimiter)})
