from __future__ import annotations

import numpy as np
import pytest

from benchmarks.high_moi import high_moi_screen, main


def test_the_screen_has_the_guides_that_are_asked_for():
    screen = high_moi_screen(5, n_cells=1_000, n_genes=30, n_targets=20, seed=1)
    calls = (screen.obsm["guides"] >= 5).toarray()
    assert calls.any(axis=1).all()  # no cell is free of guides
    assert calls.sum(axis=1).mean() == pytest.approx(5, abs=0.3)
    assert screen.uns["guides"]["target"].nunique() == 20
    truth = screen.uns["truth"]
    inactive = ~truth["mask"].any(axis=1)
    assert inactive.sum() == 10
    np.testing.assert_array_equal(truth["change"][inactive], 0)
    assert (np.abs(truth["change"][~inactive]).max(axis=1) > 0.05).all()


@pytest.mark.slow
def test_it_prints_tables(capsys):
    main(["--guides", "3", "--seeds", "0", "--max-epochs", "1", "--n-null", "10"])
    out = capsys.readouterr().out
    assert "### Many guides a cell" in out
    assert "| guides a cell | nominal | calls | FDR | power |" in out
