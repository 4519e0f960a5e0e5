"""Which perturbations move cells towards a state or signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from scipy import sparse
from scvi.utils import track

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError, listed
from scvi_sams.data.conditions import Conditions
from scvi_sams.model.gene_effects import response_sums
from scvi_sams.model.read_outs import (
    check_level,
    controls_of,
    delimiter_of,
    pairs_together,
    parse_distinct,
    provenance,
    require_effects,
)
from scvi_sams.tl._control_null import null_perturbations
from scvi_sams.tl.summaries import along_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scvi_sams.data import ConditionsLike
    from scvi_sams.model import SAMSVAE
    from scvi_sams.model.counterfactual import Counterfactual


Target: TypeAlias = "pd.Series | Mapping[str, Sequence[str]] | NDArray[np.bool_]"

_N_CELLS = 50  # effects are differences of the same states, which vary little
_FEWEST_CELLS = 10  # of a state, and of controls


def rank_perturbations(
    model: SAMSVAE,
    target: Target,
    conditions: ConditionsLike | None = None,
    *,
    measured_pairs: bool = False,
    n_samples: int = 100,
    credible_level: float = 0.95,
    counterfactual: Counterfactual | None = None,
) -> pd.DataFrame:
    r"""Which perturbations move cells towards a state or signature, and how surely.

    With :math:`\delta` a draw of the effects of a condition on genes and :math:`t` the target,
    the condition moves cells along the target by :math:`\delta \cdot t / |t|`, and away from it
    where that is negative. Draws differ by what is unknown of masks and effects; the decoder is
    taken as known. A state is known to the error of its cells, which counts too: with :math:`s_g`
    the standard error of its difference from the controls, a draw points towards it with
    probability :math:`\Phi\bigl(\delta \cdot t / \sqrt{\sum_g s_g^2 \delta_g^2}\bigr)`.

    Parameters
    ----------
    model
        A trained model whose perturbations act by a shift.
    target
        One of the following:

        * log fold changes: a Series named by genes. Genes that it lacks do not count.
        * sets of genes, ``{"up": [...], "down": [...]}``, one of them at least. Other genes do not
          count.
        * a state: which cells of the model's AnnData are in it, a boolean for each, such as
          ``adata.obs["cell_type"] == "erythroid"``. It is their mean log expression against the
          other control cells of their batch.
    conditions
        As in :meth:`SAMSVAE.predict`; all single perturbations by default, null ones left out.
    measured_pairs
        Whether to add the pairs that some cell has.
    n_samples
        Draws of masks and effects, two at least.
    credible_level
        Level of the intervals.
    counterfactual
        The cells, from :meth:`SAMSVAE.counterfactual`; 50 basal states from the prior by default.

    Returns
    -------
    pandas.DataFrame
        A row a condition, by falling ``score``:

        * ``score``: posterior mean of the move along the target, in the units of
          :meth:`SAMSVAE.get_average_treatment_effect`, with the interval ``score_lower`` to
          ``score_upper``
        * ``similarity``: posterior mean of the cosine of effect and target, between -1 and 1
        * ``sign``: 1 for towards, -1 for away, whichever is more probable
        * ``probability``, ``probability_away``: that it moves cells towards, or away; what is left
          to one is the probability of neither

        ``attrs`` holds ``n_genes``, the number of genes that count.

    Raises
    ------
    NotImplementedError
        If perturbations do not act by a shift (ConditionalVAE).
    UnknownPerturbationError
        If a condition names a perturbation that the model has not seen.
    ScreenError
        If the target names no gene of the model, has a number that is not finite or no number but
        zero; of a state, if there is no AnnData, the model is not of counts, or it or the other
        controls are fewer than ten cells.

    See Also
    --------
    differential_expression : Genes that one condition changes.

    Examples
    --------
    >>> erythroid = {"up": ["HBG1", "HBZ", "GYPA"], "down": ["SPI1"]}
    >>> found = scvi_sams.tl.rank_perturbations(model, erythroid)  # doctest: +SKIP
    >>> found.query("probability > 0.95")  # doctest: +SKIP
    """
    require_effects(model, "rank_perturbations")
    check_level(credible_level)
    if (n_samples := checked("n_samples", n_samples)) < 2:
        raise ScreenError(f"n_samples={n_samples}: at least two draws are needed.")
    direction, error = _direction(model, target)
    if conditions is None:
        names = model.perturbation_names
        nulls = set(null_perturbations(names))
        conditions = [name for name in names if name not in nulls]
    asked = parse_distinct(model, conditions)
    if measured_pairs:
        asked = _with_pairs(model, asked)
    cells = model.counterfactual(n_cells=_N_CELLS) if counterfactual is None else counterfactual
    nothing = Conditions.from_request({}, cells.perturbations)
    # Not about their expectation, which would turn effects that are zero to one side.
    draws = cells.draw(n_samples, asked, centred=False)
    against = cells.means(nothing, 0, draws)
    rows = []
    for row in track(range(len(asked.labels)), "Effects", disable=len(asked.labels) < 20):
        effects = cells.means(asked, row, draws) - against
        rows.append(along_target(effects, direction, error, credible_level))
    table = pd.DataFrame(rows, index=pd.Index(asked.labels, name="condition"))
    table = table.sort_values("score", ascending=False, kind="stable")
    table.attrs = provenance(model, cells.seed) | {
        "units": cells.units,
        "credible_level": credible_level,
        "n_genes": int(np.isfinite(direction).sum()),
    }
    return table


def _with_pairs(model: SAMSVAE, asked: Conditions) -> Conditions:
    """Conditions, and the measured pairs that are not among them."""
    if model.adata is None:
        raise ScreenError(
            "measured_pairs=True: which pairs were measured is in the AnnData, and the model was "
            "loaded without it. Name them in `conditions`."
        )
    names, join = model.perturbation_names, delimiter_of(model).join
    pairs = [join((names[a], names[b])) for a, b in pairs_together(model)]
    return parse_distinct(model, list(dict.fromkeys([*asked.labels, *pairs])))


def _direction(
    model: SAMSVAE, target: Target
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The target by gene of the model, NaN for what does not count, and its standard error."""
    if isinstance(target, Mapping):
        target = _of_sets(target)
    if isinstance(target, pd.Series) and target.dtype != bool:
        return _of_genes(target, model.get_var_names()), None
    return _of_cells(model, target)


def _of_sets(sets: Mapping[str, Sequence[str]]) -> pd.Series:
    if unknown := [name for name in sets if name not in ("up", "down")]:
        raise ScreenError(f"target has {unknown[0]!r}: give sets of genes as 'up' and 'down'.")
    up, down = (list(map(str, sets.get(name, ()))) for name in ("up", "down"))
    if both := set(up) & set(down):
        raise ScreenError(f"target: {listed(sorted(both))} is in both sets: keep it in one.")
    up, down = list(dict.fromkeys(up)), list(dict.fromkeys(down))
    return pd.Series([1.0] * len(up) + [-1.0] * len(down), index=up + down)


def _of_genes(target: pd.Series, genes: NDArray[np.str_]) -> NDArray[np.float64]:
    values = target.set_axis(target.index.astype(str)).astype(np.float64)
    if values.index.has_duplicates:
        twice = values.index[values.index.duplicated()][0]
        raise ScreenError(f"target has the gene {twice!r} twice: keep one.")
    if not np.isfinite(values.to_numpy()).all():
        raise ScreenError("target has numbers that are not finite: leave these genes out.")
    direction = values.reindex(genes).to_numpy()
    if not np.nansum(direction**2) > 0:
        raise ScreenError(
            f"target has no gene of the model with a number but zero; it names "
            f"{listed(values.index)}, the model {listed(genes)}."
        )
    return direction


def _of_cells(model: SAMSVAE, state: Target) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean difference of a state from the controls of its batch, and its standard error."""
    if model.adata is None:
        raise ScreenError(
            "target: a state is of cells, and the model was loaded without its AnnData; load it "
            "with, or give log fold changes."
        )
    if not model.module.is_count_model:
        raise ScreenError("target: a state needs a model of counts; give differences by feature.")
    if isinstance(state, pd.Series) and state.index.equals(model.adata.obs_names):
        state = state.to_numpy()
    mask = np.asarray(state)
    if isinstance(state, pd.Series) or mask.dtype != bool or mask.shape != (model.adata.n_obs,):
        raise ScreenError(
            "target cannot be read: give a Series of log fold changes by gene, {'up': [...], "
            f"'down': [...]}}, or True or False for each of the {model.adata.n_obs} cells of the "
            "model's AnnData."
        )
    controls = controls_of(model) & ~mask
    for name, number in (("the state", mask.sum()), ("the other controls", controls.sum())):
        if number < _FEWEST_CELLS:
            raise ScreenError(
                f"target: {name} has {number} cells, and {_FEWEST_CELLS} are needed."
            )
    sums = response_sums(
        model,
        np.flatnonzero(mask | controls),
        sparse.csr_matrix(mask[:, None], dtype=np.float32),
    )
    return sums.score[0] / mask.sum(), sums.errors()[0][0]
