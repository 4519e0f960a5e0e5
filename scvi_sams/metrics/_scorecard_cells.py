"""Held-out and training cells of a scorecard: what was observed, ceilings, distances of cells."""

from __future__ import annotations

__all__ = ["ScoredCells", "energy_distances"]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams.metrics._ceilings import bootstrap_weights, half_weights
from scvi_sams.metrics._distribution_distance import energy_distance
from scvi_sams.metrics._embedding import ExpressionPCA
from scvi_sams.metrics._profiles import dense
from scvi_sams.metrics._scorecard_measures import EffectTables, parts_of
from scvi_sams.metrics._weighted_error import differential_expression_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from scvi_sams.metrics._cell_groups import CellGroups, ControlMeans

_CONDITION, _CONTROL, _LIBRARY = "condition", "control", "library_size"
_MAX_CELLS = 500  # of a condition, in distances, which cost the square of it


@dataclass(frozen=True)
class ScoredCells:
    """Held-out cells of the conditions that are scored, with the training cells."""

    held_out: CellGroups
    training: CellGroups
    parts: CellGroups
    """Training cells of the perturbations that scored combinations are made of."""
    training_controls: ControlMeans
    combinations: list[str]
    """Scored combinations whose parts were all measured alone in training."""
    has_own_controls: bool
    """Whether held-out controls are what effects are against."""

    @classmethod
    def of(
        cls,
        held_out: CellGroups,
        training: CellGroups,
        conditions: Sequence[str],
        combination_delimiter: str | None,
        min_controls: int,
    ) -> ScoredCells:
        """Pick the cells for the conditions."""
        trained = set(training.conditions)
        combinations = {
            name: parts
            for name, parts in parts_of(conditions, combination_delimiter).items()
            if trained.issuperset(parts)
        }
        singles = sorted({part for parts in combinations.values() for part in parts})
        return cls(
            held_out.restricted(conditions),
            training,
            training.restricted(singles),
            training.control_means(),
            list(combinations),
            int((held_out.condition == -1).sum()) >= max(min_controls, 1),
        )

    def tables(
        self,
        weights: NDArray[np.float64] | None = None,
        part_weights: NDArray[np.float64] | None = None,
        with_errors: bool = True,
    ) -> EffectTables:
        """Effects in the held-out cells, each counted as often as ``weights`` says."""
        if self.has_own_controls:
            controls = self.held_out.control_means(weights)
        else:
            controls = self.parts.control_means(part_weights)
        return EffectTables(
            self.held_out.effects(controls, weights, with_errors),
            self.held_out.effects(self.training_controls, weights, with_errors),
            self.with_parts(weights, part_weights, with_errors) if self.combinations else None,
        )

    def with_halves(
        self, tables: EffectTables, first: NDArray[np.float64], second: NDArray[np.float64]
    ) -> EffectTables:
        """Add the effects in two sets of cells."""
        halves = [
            self.held_out.effects(self.training_controls, weights, with_errors=False)
            for weights in (first, second)
        ]
        return tables._replace(halves=(halves[0], halves[1]))

    def bootstrapped(self, first_half: NDArray[np.float64], rng: Generator) -> EffectTables:
        """Effects in cells drawn with replacement, over all and within each half."""
        tables = self.tables(
            bootstrap_weights(self.held_out, rng),
            bootstrap_weights(self.parts, rng),
            with_errors=False,
        )
        drawn = []
        for half in (first_half, 1 - first_half):
            inside = np.where(half > 0, self.held_out.condition, -2)
            drawn.append(half * bootstrap_weights(replace(self.held_out, condition=inside), rng))
        return self.with_halves(tables, *drawn)

    def split(self, rng: Generator) -> tuple[EffectTables, EffectTables]:
        """Effects in two halves of the cells."""
        of_cells, of_parts = half_weights(self.held_out, rng), half_weights(self.parts, rng)
        first, second = (
            self.tables(*weights, with_errors=False)
            for weights in ((of_cells, of_parts), (1 - of_cells, 1 - of_parts))
        )
        return first, second

    def gene_weights(self, half: NDArray[np.float64]) -> pd.DataFrame:
        """Weights of genes by differential expression in some of the held-out cells."""
        rows = [_labelled(self.held_out, (half > 0) & (self.held_out.condition >= -1))]
        if not (rows[0].obs[_CONDITION] == _CONTROL).any():
            rows.append(_labelled(self.training, self.training.condition == -1))
        matrices = [row.X for row in rows]
        stacked = sp.vstack(matrices, "csr") if sp.issparse(matrices[0]) else np.vstack(matrices)
        obs = pd.concat([row.obs for row in rows], ignore_index=True)
        obs.index = obs.index.astype(str)
        cells = ad.AnnData(stacked, obs=obs, var=rows[0].var)
        return differential_expression_weights(
            cells, _CONDITION, _CONTROL, size_factor_key=_LIBRARY
        )

    def with_parts(
        self,
        weights: NDArray[np.float64] | None,
        part_weights: NDArray[np.float64] | None,
        with_errors: bool,
    ) -> ad.AnnData:
        """Effects of the combinations, and of their parts in training cells."""
        controls = self.parts.control_means(part_weights)
        tables = [
            self.held_out.restricted(self.combinations).effects(controls, weights, with_errors),
            self.parts.effects(controls, part_weights, with_errors),
        ]
        return ad.AnnData(
            np.vstack([table.X for table in tables]),
            obs=pd.concat([table.obs for table in tables]),
            var=tables[0].var,
            layers={
                name: np.vstack([table.layers[name] for table in tables])
                for name in tables[0].layers
            },
        )


def energy_distances(
    cells: ScoredCells,
    predicted_cells: Mapping[str, ad.AnnData],
    predicted_effects: Mapping[str, ad.AnnData],
    rng: Generator,
) -> dict[str, pd.Series]:
    """E-distance between predicted and held-out cells, by predictor and condition.

    Distances are unbiased ones, in principal components of the training cells. A baseline's cells
    are training controls, moved by the effect it predicts; the distance between two halves of the
    held-out cells is the ceiling ``"split half"``.
    """
    training, held_out = cells.training, cells.held_out
    pca = ExpressionPCA(scale=training.scale).fit(
        _labelled(training, _some(training.condition >= -1, 20_000, rng)), None, _LIBRARY
    )
    controls = pca.transform(
        _labelled(training, _some(training.condition == -1, _MAX_CELLS, rng)), None, _LIBRARY
    )
    observed = {}
    for code, condition in enumerate(held_out.conditions):
        drawn = _labelled(held_out, _some(held_out.condition == code, _MAX_CELLS, rng))
        observed[condition] = _coordinates(pca.transform(drawn, None, _LIBRARY))
    control_coordinates = _coordinates(controls)
    components = pca.components_.loc[:, list(training.adata.var_names)].to_numpy()

    distances = {}
    for name, simulated in predicted_cells.items():
        coordinates = _coordinates(pca.transform(simulated, None, _LIBRARY))
        of_condition = simulated.obs[_CONDITION].astype(str).to_numpy()
        distances[name] = pd.Series(
            {
                condition: energy_distance(
                    coordinates[of_condition == condition][:_MAX_CELLS], truth, unbiased=True
                )
                for condition, truth in observed.items()
            }
        )
    for name, effects in predicted_effects.items():
        moved = dense(effects[list(observed)].X) @ components.T
        distances[name] = pd.Series(
            {
                condition: energy_distance(control_coordinates + shift, truth, unbiased=True)
                for (condition, truth), shift in zip(observed.items(), moved, strict=True)
            }
        )
    halves = {}
    for condition, truth in observed.items():
        shuffled = rng.permutation(truth)
        half = len(truth) // 2
        halves[condition] = energy_distance(shuffled[:half], shuffled[half:], unbiased=True)
    distances["split half"] = pd.Series(halves)
    return distances


def _coordinates(table: Any) -> NDArray[np.float64]:
    return np.asarray(table, dtype=np.float64)


def _some(chosen: NDArray[np.bool_], limit: int, rng: Generator) -> NDArray[np.bool_]:
    """At most so many of the chosen cells."""
    positions = np.flatnonzero(chosen)
    kept = np.zeros(chosen.size, dtype=bool)
    kept[rng.permutation(positions)[:limit]] = True
    return kept


def _labelled(cells: CellGroups, kept: NDArray[np.bool_]) -> ad.AnnData:
    """Counts of some cells with their condition and library size, and nothing else."""
    matrix = cells.adata.X if cells.layer is None else cells.adata.layers[cells.layer]
    counts = matrix[np.flatnonzero(kept)]
    names = np.append(np.asarray(cells.conditions, dtype=object), [_CONTROL])
    if cells.library is None:
        library = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    else:
        library = cells.library[kept].to_numpy(dtype=float)
    obs = pd.DataFrame({_CONDITION: names[cells.condition[kept]], _LIBRARY: library})
    obs.index = obs.index.astype(str)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=cells.adata.var_names))
