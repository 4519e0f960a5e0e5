"""The plot of differences between contexts: each number is where it should be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_sams import ScreenError, pl


def _table():
    rows = pd.MultiIndex.from_product([["A$1$", "B"], ["T", "B"], ["latent_0", "latent_1"]])
    table = rows.to_frame(index=False, name=["perturbation", "context", "latent"])
    table["shared_effect"] = [1.0, 0.0, 1.0, 0.0, 2.0, 0.0, 2.0, 0.0]
    table["difference"] = [0.0, 0.1, -1.5, 0.0, 0.5, 0.0, 0.0, 0.0]
    table["sd"] = 0.1
    table["probability"] = [0.0, 0.2, 1.0, 0.0, 0.6, 0.1, 0.0, 0.0]
    table["called"] = table["probability"] > 0.9
    table["measured"] = ~((table["perturbation"] == "B") & (table["context"] == "B"))
    return table


def test_called_first_and_each_effect_is_that_of_its_context():
    ax = pl.context_differences(_table(), n_rows=2)
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == [r"A\$1\$, latent_0", "B, latent_0"]
    bars, *intervals = ax.collections
    assert [segment[0, 0] for segment in bars.get_segments()] == [1.0, 2.0]
    first, second = (collection.get_segments() for collection in intervals)
    np.testing.assert_allclose([s[:, 0].mean() for s in first], [1.0, 2.5])
    np.testing.assert_allclose(first[0][:, 0], [1 - 0.196, 1 + 0.196])
    np.testing.assert_allclose([s[:, 0].mean() for s in second], [-0.5])  # B is not measured in B
    filled = [line for line in ax.lines if line.get_markerfacecolor() == line.get_color()]
    assert [x for line in filled for x in line.get_xdata() if line.get_marker() == "o"] == [-0.5]


def test_what_cannot_be_drawn():
    with pytest.raises(ScreenError, match="no column called"):
        pl.context_differences(_table().drop(columns="called"))
    with pytest.raises(ScreenError, match="no row"):
        pl.context_differences(_table().iloc[:0])
    many = pd.concat([_table().assign(context=f"c{k}") for k in range(9)])
    with pytest.raises(ScreenError, match="9 contexts"):
        pl.context_differences(many)
