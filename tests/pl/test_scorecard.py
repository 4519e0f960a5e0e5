from __future__ import annotations

import numpy as np
import pytest

import scvi_sams
from scvi_sams import pl
from scvi_sams.evaluation import observed_effects, score_predictions


@pytest.fixture(scope="module")
def card():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=1_500, n_genes=60, n_perturbations=10, n_pairs=0
    )
    training, held_out = adata[::2].copy(), adata[1::2].copy()
    effects = observed_effects(held_out, "perturbation", "control").to_df()
    return score_predictions(
        {"A": effects, "B": 2 * effects}, held_out, training, "perturbation", "control"
    )


@pytest.mark.parametrize("measure", ["pearson_perturbed", "relative_squared_error"])
def test_every_predictor_is_drawn_at_its_mean(card, measure):
    ax = pl.scorecard(card, measure)
    ax.figure.canvas.draw()
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == list(card.kinds)
    means = [line.get_xdata()[0] for line in ax.lines if line.get_marker() in {"D", "o", "s"}]
    np.testing.assert_allclose(means, card.table.loc[names, measure])
    dots = np.concatenate([each.get_offsets()[:, 0] for each in ax.collections])
    values = card.per_condition.query("measure == @measure")["value"].dropna()
    np.testing.assert_allclose(np.sort(dots), np.sort(values))


def test_the_line_is_at_the_best_baseline(card):
    ax = pl.scorecard(card, "relative_squared_error")
    baselines = [name for name, kind in card.kinds.items() if kind == "baseline"]
    (line,) = (line for line in ax.lines if line.get_linestyle() == "--")
    assert line.get_xdata()[0] == card.table.loc[baselines, "relative_squared_error"].min()
    assert card.best_baseline("pearson") == card.table.loc[baselines, "pearson"].idxmax()


def test_a_measure_has_the_name_that_the_card_knows_it_by(card):
    ax = pl.scorecard(card, "relative_squared_error")
    assert ax.get_xlabel() == "relative_squared_error (rel. error ↓)"
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["model", "baseline", "ceiling", "best baseline"]


def test_a_measure_without_conditions_or_baselines_is_drawn(card):
    ax = pl.scorecard(card, "collapse_index")
    ax.figure.canvas.draw()
    assert "split half" not in [label.get_text() for label in ax.get_yticklabels()]


def test_an_unknown_measure_is_refused(card):
    with pytest.raises(ValueError, match=r"'r2' is not on the card; it has pearson"):
        pl.scorecard(card, "r2")
