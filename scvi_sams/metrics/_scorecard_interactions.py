"""Interactions of held-out combinations, without the noise that fits share with what they score.

An interaction is the effect of a combination less those of its parts. Parts that were measured in
training cells have noise which is in every prediction made from them: it would look like
agreement, and reward a baseline that keeps it.
"""

from __future__ import annotations

__all__ = ["interaction_scores"]

from typing import TYPE_CHECKING

from scvi_sams.metrics._ceilings import half_weights
from scvi_sams.metrics._scorecard_measures import interaction_correlation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import anndata as ad
    import pandas as pd
    from numpy.random import Generator

    from scvi_sams.metrics._baselines import Baseline
    from scvi_sams.metrics._cell_groups import CellGroups
    from scvi_sams.metrics._scorecard_cells import ScoredCells


def interaction_scores(
    cells: ScoredCells,
    held_out: CellGroups,
    predictions: Mapping[str, ad.AnnData],
    baselines: Sequence[Baseline],
    combination_delimiter: str | None,
    min_cells: int,
    rng: Generator,
) -> tuple[dict[str, pd.Series], str]:
    """Correlate predicted with observed interactions, by predictor and combination.

    Where every part has enough held-out cells, parts are measured in these. Otherwise they are
    measured in one half of the training cells and baselines fitted on the other, both ways round;
    a model has seen both.

    Returns
    -------
    Scores, and what a reader should know of them.
    """
    names = [*cells.combinations, *cells.parts.conditions]
    enough = (held_out.n_cells.reindex(cells.parts.conditions, fill_value=0) >= min_cells).all()
    if enough and cells.has_own_controls:
        table = held_out.restricted(names).effects(held_out.control_means(), with_errors=False)
        training = cells.training.effects(cells.training_controls, with_errors=False)
        folds = [(table, training)]
        note = ""
    else:
        learned = cells.training.restricted(
            cells.training.n_cells[cells.training.n_cells >= 2].index
        )
        first = half_weights(learned, rng)
        folds = [
            (
                cells.with_parts(None, scored, with_errors=False),
                learned.effects(learned.control_means(fitted), fitted, with_errors=False),
            )
            for scored, fitted in ((first, 1 - first), (1 - first, first))
        ]
        note = (
            "interaction r: parts are measured in training cells. Baselines are fitted on other "
            "halves of them than those scored; models have seen both, which flatters a model that "
            "overfits."
        )
    scores: dict[str, list[pd.Series]] = {}
    for observed, training in folds:
        tables = dict(predictions)
        tables |= {baseline.name: baseline.fit(training).predict(names) for baseline in baselines}
        for name, table in tables.items():
            correlation = interaction_correlation(table, observed, combination_delimiter)
            scores.setdefault(name, []).append(correlation)
    means = {name: sum(each[1:], each[0]) / len(each) for name, each in scores.items()}
    return means, note
