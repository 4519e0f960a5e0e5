"""Draws of the effects of pairs, and what measured pairs say of a model's errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi.utils import track

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.field import registered_dosage
from scvi_sams.data.tables import log_expression_chunks
from scvi_sams.model._counterfactual_mixin import COUNTS_PER, CounterfactualMixin
from scvi_sams.model._measured_pairs import find_measured_pairs, pair_residuals, pairs_together
from scvi_sams.tl import summarize_effects
from scvi_sams.tl._pair_calibration import (
    LEAST_PAIRS,
    calibrate_pairs,
    score_gradient,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from scvi.data import AnnDataManager

    from scvi_sams.tl._pair_calibration import PairCalibration, PairResiduals

__all__ = ["Calibration", "PairDrawsMixin", "Pairs"]

Pairs: TypeAlias = "Sequence[str | tuple[str, str] | Mapping[str, float]]"
"""Pairs as labels (``"A+B"``), two names, or two doses (``{"A": 1.0, "B": 0.5}``)."""

Calibration: TypeAlias = Literal["measured"] | AnnData | None
"""Cells whose pairs say how far the model errs: those of the model, others, or none."""

_N_DRAWS, _N_CELLS = 10, 200  # of expected effects, whose own spread is not looked at
_CELLS_PER_CHUNK = 20_000

_Pair = tuple[tuple[int, float], ...]


class _ModelErrors(NamedTuple):
    """Measured pairs against the model, and the variances that follow from all of them."""

    residuals: PairResiduals
    of_all: PairCalibration
    row: dict[_Pair, int]
    """Rows of the pairs, by their perturbations and doses."""

    def of(self, pair: _Pair) -> PairCalibration | None:
        """Variances learned without the pair itself; none if the others are too few."""
        row = self.row.get(pair)
        if row is None:
            return self.of_all
        return (
            calibrate_pairs(self.residuals.without(row)) if len(self.row) > LEAST_PAIRS else None
        )


class PairDrawsMixin(CounterfactualMixin):
    """Steps that the methods about pairs share."""

    get_anndata_manager: Callable[..., AnnDataManager]

    def _require_pairs(self, method: str) -> None:
        """Raise if effects of pairs are not made from those of their parts."""
        self._require_effects(method)
        if self.registry["setup_args"].get("combinations") == "own":
            raise NotImplementedError(
                f"{method}: in this {type(self).__name__} every combination is a perturbation of "
                "its own, which says nothing of pairs that were not measured; set up with "
                "combinations='additive'. For measured pairs see get_average_treatment_effect() "
                "and scvi_sams.tl.classify_pairs()."
            )

    def _parse_pairs(self, pairs: Pairs) -> tuple[sparse.csr_matrix, list[str]]:
        """Doses of pairs (pairs x perturbations), and their labels."""
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):
            raise ScreenError(f"pairs={pairs!r}: give a list of pairs, such as ['A+B'].")
        written = [dict.fromkeys(pair, 1.0) if isinstance(pair, tuple) else pair for pair in pairs]
        dosage, labels = self._parse_distinct_conditions(written)
        dosage.eliminate_zeros()
        dosage.sort_indices()
        for label, number in zip(labels, np.diff(dosage.indptr), strict=True):
            if number != 2:
                raise ScreenError(
                    f"{label!r} is {number} perturbation{'' if number == 1 else 's'}, not a pair."
                )
        return dosage, labels

    def _pair_draws(
        self,
        dosage: sparse.csr_matrix,
        n_samples: int,
        n_cells: int,
        credible_level: float,
        basal: Literal["prior", "control"] | AnnData | Sequence[int],
        batch: str | None,
        seed: int,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Draws of the effects of both parts and of each pair, draws x genes each."""
        if n_samples < 2:
            raise ScreenError(f"n_samples={n_samples}: at least two draws are needed.")
        # Refused before the work, not after it.
        summarize_effects(np.zeros((1, 1)), credible_level)
        # Each part at each of its doses once, however many pairs it is in.
        parts = pd.DataFrame({"column": dosage.indices, "dose": dosage.data})
        part_of = parts.groupby(["column", "dose"], sort=False).ngroup().to_numpy().reshape(-1, 2)
        single = parts.drop_duplicates()
        n_singles, n_names = len(single), len(self.perturbation_names)
        singles = sparse.csr_matrix(
            (single["dose"], (np.arange(n_singles), single["column"])), shape=(n_singles, n_names)
        )
        nothing = sparse.csr_matrix((1, n_names), dtype=dosage.dtype)
        used = sparse.vstack([nothing, singles, dosage], "csr")
        with self._seeded(seed):
            population, _ = self._population(basal, n_cells, batch, None)
            draws = self._sample_globals(n_samples, used)

        def effect(row: int) -> np.ndarray:
            means = self._population_means(population, used, row, draws)
            return np.asarray(means - against)

        against = self._population_means(population, used, 0, draws)
        of_part = [effect(1 + row) for row in range(n_singles)]
        n_pairs = dosage.shape[0]
        rows = track(range(n_pairs), description="Pairs", disable=n_pairs < 20)
        return (
            (of_part[part_of[row, 0]], of_part[part_of[row, 1]], effect(1 + n_singles + row))
            for row in rows
        )

    @torch.inference_mode()
    def _model_errors(self, calibration: Calibration, seed: int) -> _ModelErrors | None:
        """How measured pairs differ from what the model says of them; none if they are few."""
        if calibration is None:
            return None
        if isinstance(calibration, str) and calibration != "measured":
            raise ScreenError(
                f"calibration={calibration!r} is unknown; use 'measured', an AnnData or None."
            )
        adata = self.adata if isinstance(calibration, str) else self._validate_anndata(calibration)
        if adata is None:  # the model was loaded without its cells
            return None
        manager = self.get_anndata_manager(adata, required=True)
        dosage = registered_dosage(manager)
        measured = find_measured_pairs(dosage, seed, without=self._pairs_with_a_shift)
        pairs = _pairs_of(measured.dosage)
        if len(pairs) < LEAST_PAIRS:
            return None
        drawn = self._pair_draws(measured.dosage, _N_DRAWS, _N_CELLS, 0.5, "prior", None, seed)
        effects, gradients = [], []
        for draws in drawn:
            first, second, pair = (effect.mean(0, dtype=np.float64) for effect in draws)
            effects.append((first, second, pair))
            gradients.append(score_gradient(first, second, pair))
        residuals = pair_residuals(measured, self._expression_chunks(adata), effects, gradients)
        row = {pair: place for place, pair in enumerate(pairs)}
        return _ModelErrors(residuals, calibrate_pairs(residuals), row)

    def _calibrations(
        self,
        dosage: sparse.csr_matrix,
        calibration: Calibration,
        seed: int,
    ) -> list[PairCalibration | None]:
        """Variances of the model's errors for each pair; none for a pair where they are unknown.

        A pair with a shift of its own follows the noise of its cells, and errs otherwise than
        those from which the variances were learned.
        """
        pairs = _pairs_of(dosage)
        own = self._pairs_with_a_shift
        errors = self._model_errors(calibration, seed)
        return [
            None if errors is None or tuple(t for t, _ in pair) in own else errors.of(pair)
            for pair in pairs
        ]

    @property
    def _pairs_with_a_shift(self) -> set[tuple[int, int]]:
        interactions = getattr(self.module, "interactions", None)
        return set() if interactions is None else set(interactions.pairs)

    def _expression_chunks(
        self, adata: AnnData
    ) -> Iterator[tuple[slice, np.ndarray | sparse.csr_matrix]]:
        """Observed expression on the scale of effects, runs of cells x genes."""
        arguments = self.registry["setup_args"]
        layer, key = arguments["layer"], arguments["size_factor_key"]
        if self.module.is_count_model:
            library = None if key is None else adata.obs[key]
            yield from log_expression_chunks(adata, layer, library, COUNTS_PER)
            return
        matrix = adata.X if layer is None else adata.layers[layer]
        for start in range(0, adata.n_obs, _CELLS_PER_CHUNK):
            rows = slice(start, min(start + _CELLS_PER_CHUNK, adata.n_obs))
            yield rows, matrix[rows]

    def _measured_pairs(self) -> set[tuple[int, int]] | None:
        """Pairs that cells have together, by their positions; ``None`` without the AnnData."""
        if self.adata is None:
            return None
        dosage = registered_dosage(self.adata_manager)
        return set(pairs_together(dosage))


def _pairs_of(dosage: sparse.csr_matrix) -> list[_Pair]:
    """Perturbations and doses of each pair, by the position of the perturbation."""
    columns, doses = dosage.indices.reshape(-1, 2), dosage.data.reshape(-1, 2)
    return [
        tuple(sorted(zip(members, sizes, strict=True)))
        for members, sizes in zip(columns.tolist(), doses.tolist(), strict=True)
    ]
