"""Draws of the effects of pairs, and how far measured pairs are from what a model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.utils import track

from scvi_sams._exceptions import ScreenError
from scvi_sams.data import Conditions
from scvi_sams.data.field import registered_conditions
from scvi_sams.data.tables import CELLS_PER_CHUNK, log_expression_chunks
from scvi_sams.model.counterfactual import COUNTS_PER
from scvi_sams.model.read_outs import parse_distinct, require_effects
from scvi_sams.tl.pair_calibration import (
    LEAST_PAIRS,
    calibrate_pairs,
    find_measured_pairs,
    pair_residuals,
    score_gradient,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from scipy import sparse

    from scvi_sams.model import SAMSVAE
    from scvi_sams.model.counterfactual import Counterfactual
    from scvi_sams.tl.pair_calibration import PairCalibration, PairResiduals

Pairs: TypeAlias = "Sequence[str | tuple[str, str] | Mapping[str, float]]"
"""Pairs as labels (``"A+B"``), two names, or two doses (``{"A": 1.0, "B": 0.5}``)."""

Calibration: TypeAlias = Literal["measured"] | AnnData | None
"""Cells whose pairs say how far the model errs: those of the model, others, or none."""

_N_DRAWS, _N_CELLS = 10, 200  # of expected effects, whose own spread is not looked at


def require_pairs(model: SAMSVAE, caller: str) -> None:
    """Raise if effects of pairs are not made from those of their parts."""
    require_effects(model, caller)
    if model.registry["setup_args"].get("combinations") == "own":
        raise NotImplementedError(
            f"{caller}: in this {type(model).__name__} every combination is a perturbation of its "
            "own, which says nothing of pairs that were not measured; set up with "
            "combinations='additive'. For measured pairs see get_average_treatment_effect() and "
            "scvi_sams.tl.classify_pairs()."
        )


def parse_pairs(model: SAMSVAE, pairs: Pairs) -> Conditions:
    """Read pairs, each with two perturbations in the order of their positions."""
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise ScreenError(f"pairs={pairs!r}: give a list of pairs, such as ['A+B'].")
    written = [dict.fromkeys(pair, 1.0) if isinstance(pair, tuple) else pair for pair in pairs]
    asked = parse_distinct(model, written)
    for label, number in zip(asked.labels, (asked.dose > 0).sum(1), strict=True):
        if number != 2:
            raise ScreenError(
                f"{label!r} is {number} perturbation{'' if number == 1 else 's'}, not a pair."
            )
    return asked


def pair_draws(
    cells: Counterfactual, index: np.ndarray, dose: np.ndarray, n_samples: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draws of the effects of both parts and of each pair, draws x genes each.

    Pairs are given by the positions of their perturbations and the doses, pairs x 2 each.
    """
    if n_samples < 2:
        raise ScreenError(f"n_samples={n_samples}: at least two draws are needed.")
    names, n_pairs = cells.perturbations, len(index)

    def conditions(index: np.ndarray, dose: np.ndarray) -> Conditions:
        return Conditions(names, index, dose, [""] * len(index), np.arange(len(index)))

    # Each part at each of its doses once, however many pairs it is in.
    parts = pd.DataFrame({"index": index.ravel(), "dose": dose.ravel()})
    part_of = parts.groupby(["index", "dose"], sort=False).ngroup().to_numpy().reshape(-1, 2)
    single = parts.drop_duplicates()
    singles = conditions(single[["index"]].to_numpy(), single[["dose"]].to_numpy())
    pairs = conditions(index, dose)
    draws = cells.draw(n_samples, pairs)
    against = cells.means(conditions(0 * index[:1], 0 * dose[:1]), 0, draws)
    of_part = [cells.means(singles, row, draws) - against for row in range(len(single))]
    for row in track(range(n_pairs), description="Pairs", disable=n_pairs < 20):
        first, second = part_of[row]
        yield of_part[first], of_part[second], cells.means(pairs, row, draws) - against


class ModelErrors(NamedTuple):
    """Measured pairs against the model, and the variances that follow from all of them."""

    residuals: PairResiduals
    of_all: PairCalibration
    row: dict[tuple[float, ...], int]
    """Rows of the pairs, by their perturbations and doses."""
    with_a_shift: set[tuple[int, int]]
    """Pairs with a shift of their own, which follow the noise of their cells and err otherwise."""

    def of(self, index: np.ndarray, dose: np.ndarray) -> list[PairCalibration | None]:
        """Variances for each pair, learned without it; none where they are unknown."""
        return [self._of_pair(pair) for pair in _keys(index, dose)]

    def _of_pair(self, pair: tuple[float, ...]) -> PairCalibration | None:
        row = self.row.get(pair)
        if pair[:2] in self.with_a_shift or (row is not None and len(self.row) <= LEAST_PAIRS):
            return None
        return self.of_all if row is None else calibrate_pairs(self.residuals.without(row))


def model_errors(model: SAMSVAE, calibration: Calibration, seed: int | None) -> ModelErrors | None:
    """How measured pairs differ from what the model says of them; none if they are few."""
    if calibration is None:
        return None
    if isinstance(calibration, str) and calibration != "measured":
        raise ScreenError(
            f"calibration={calibration!r} is unknown; use 'measured', an AnnData or None."
        )
    adata = model.adata if isinstance(calibration, str) else model._validate_anndata(calibration)
    if adata is None:  # the model was loaded without its cells
        return None
    interactions = getattr(model.module, "interactions", None)
    own = set() if interactions is None else set(interactions.pairs)
    manager = model.get_anndata_manager(adata, required=True)
    measured = find_measured_pairs(registered_conditions(manager), seed, without=own)
    if len(measured.perturbation) < LEAST_PAIRS:
        return None
    cells = model.counterfactual(n_cells=_N_CELLS, seed=seed)
    effects, gradients = [], []
    for draws in pair_draws(cells, measured.perturbation, measured.dose, _N_DRAWS):
        first, second, pair = (effect.mean(0, dtype=np.float64) for effect in draws)
        effects.append((first, second, pair))
        gradients.append(score_gradient(first, second, pair))
    residuals = pair_residuals(measured, _expression_chunks(model, adata), effects, gradients)
    row = {pair: place for place, pair in enumerate(_keys(measured.perturbation, measured.dose))}
    return ModelErrors(residuals, calibrate_pairs(residuals), row, own)


def _expression_chunks(
    model: SAMSVAE, adata: AnnData
) -> Iterator[tuple[slice, np.ndarray | sparse.csr_matrix]]:
    """Observed expression on the scale of effects, runs of cells x genes."""
    arguments = model.registry["setup_args"]
    layer, key = arguments["layer"], arguments["size_factor_key"]
    if model.module.is_count_model:
        library = None if key is None else adata.obs[key]
        yield from log_expression_chunks(adata, layer, library, COUNTS_PER)
        return
    matrix = adata.X if layer is None else adata.layers[layer]
    for start in range(0, adata.n_obs, CELLS_PER_CHUNK):
        rows = slice(start, min(start + CELLS_PER_CHUNK, adata.n_obs))
        yield rows, matrix[rows]


def _keys(index: np.ndarray, dose: np.ndarray) -> list[tuple[float, ...]]:
    """Positions and doses of each pair."""
    rows = zip(index.tolist(), dose.tolist(), strict=True)
    return [(*members, *doses) for members, doses in rows]
