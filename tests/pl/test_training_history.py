from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scvi_sams import pl


def _history(**curves):
    return {name: pd.DataFrame({name: values}) for name, values in curves.items()}


def test_both_curves_are_drawn_and_named():
    history = _history(elbo_train=[9.0, 5.0, 4.0], elbo_validation=[9.5, 6.0, 5.5])
    ax = pl.training_history(history)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[9, 5, 4], [9.5, 6, 5.5]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "training cells",
        "validation cells",
    ]


def test_the_first_epochs_do_not_set_the_scale():
    curve = [1e6] + [100 - epoch for epoch in range(50)]
    ax = pl.training_history(_history(elbo_train=curve))
    bottom, top = ax.get_ylim()
    assert bottom < min(curve)
    assert top < 110


@pytest.mark.parametrize("curve", [[5.0], [5.0, 5.0], [float("inf"), 5.0, 4.0]])
def test_short_flat_and_infinite_histories_are_drawn(curve):
    ax = pl.training_history(_history(elbo_train=curve))
    ax.figure.canvas.draw()


def test_no_history_is_refused():
    for nothing in (None, {}, _history(kl_weight=[1.0])):
        with pytest.raises(ValueError, match="after `train`"):
            pl.training_history(nothing)


def test_a_trained_model_is_drawn_into_given_axes_without_pyplot(trained_model):
    ax = Figure().subplots()
    before = plt.get_fignums()
    assert pl.training_history(trained_model.history, ax=ax) is ax
    assert plt.get_fignums() == before
    assert len(ax.lines) == 2
