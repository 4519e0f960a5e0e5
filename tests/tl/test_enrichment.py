from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, fisher_exact, mannwhitneyu

from scvi_sams import ScreenError
from scvi_sams.tl import gene_set_enrichment

GENES = [f"G{i:03d}" for i in range(120)]


@pytest.fixture
def programs():
    """Three programmes; of the first, the first twenty genes go up; ties and zeros in the last."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, len(GENES)))
    values[0, :20] += 2
    values[2] = values[2].round() * (rng.random(len(GENES)) < 0.7)
    return pd.DataFrame(values, index=["latent_0", "latent_1", "latent_2"], columns=GENES)


@pytest.fixture
def gene_sets():
    rng = np.random.default_rng(1)
    drawn = {f"RANDOM_{k}": rng.choice(GENES, 6 + 5 * k, replace=False) for k in range(5)}
    return {"TRUE": [*GENES[:15], "UNMEASURED"]} | drawn


def test_rank_test_is_scipys(programs, gene_sets):
    table = gene_set_enrichment(programs, gene_sets)
    assert len(table) == 18
    for row in table.itertuples():
        effect = programs.loc[row.program]
        inside = effect.index.isin(gene_sets[row.gene_set])
        expected = mannwhitneyu(
            effect[inside], effect[~inside], use_continuity=False, method="asymptotic"
        )
        assert row.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert row.n_genes == inside.sum()
        more = expected.statistic >= inside.sum() * (~inside).sum() / 2
        assert row.direction == ("up" if more else "down")
        assert (row.score >= 0) == more
    np.testing.assert_allclose(table["q_value"], false_discovery_control(table["p_value"]))


def test_overlap_test_is_fishers(programs, gene_sets):
    table = gene_set_enrichment(programs, gene_sets, "hypergeometric", n_top_genes=25)
    assert len(table) == 36
    for row in table.itertuples():
        effect = programs.loc[row.program] * (1 if row.direction == "up" else -1)
        positive = effect[effect > 0]
        top = set(positive.sort_values(ascending=False, kind="stable").index[:25])
        members = set(gene_sets[row.gene_set]) & set(GENES)
        overlap = len(top & members)
        assert row.n_overlap == overlap
        counts = [[overlap, len(members) - overlap], [len(top) - overlap, 0]]
        counts[1][1] = len(GENES) - sum(map(sum, counts))
        assert row.p_value == pytest.approx(fisher_exact(counts, "greater").pvalue, rel=1e-9)
        assert row.score == pytest.approx(overlap * len(GENES) / (len(members) * len(top)))
        listed = row.genes.split(",") if row.genes else []
        assert set(listed) == top & members or len(listed) == 20
        assert effect[listed].is_monotonic_decreasing


@pytest.mark.parametrize("test", ["rank", "hypergeometric"])
def test_finds_what_is_there(programs, gene_sets, test):
    table = gene_set_enrichment(programs, gene_sets, test, n_top_genes=20)
    first = table.iloc[0]
    assert (first["program"], first["gene_set"], first["direction"]) == ("latent_0", "TRUE", "up")
    assert first["q_value"] < 0.01
    assert (table["q_value"] < 0.05).sum() == 1
    assert set(first["genes"].split(",")) <= set(GENES[:15])
    for _, of_program in table.groupby("program"):
        assert of_program["p_value"].is_monotonic_increasing


def test_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(2)
    programs = pd.DataFrame(rng.normal(size=(40, 200)), columns=[f"G{i}" for i in range(200)])
    sets = {f"S{k}": rng.choice(programs.columns, 30, replace=False) for k in range(50)}
    p_values = gene_set_enrichment(programs, sets)["p_value"]
    for level in (0.05, 0.5):
        assert (p_values <= level).mean() == pytest.approx(level, abs=0.03)


def test_no_effect_no_evidence(gene_sets):
    nothing = pd.DataFrame(np.zeros((1, len(GENES))), index=["latent_0"], columns=GENES)
    for test in ("rank", "hypergeometric"):
        table = gene_set_enrichment(nothing, gene_sets, test)
        assert (table["p_value"] == 1).all()
        assert (table["score"] == 0).all()
        assert (table["genes"] == "").all()


def test_errors(programs, gene_sets):
    with pytest.raises(ValueError, match="test='gsea'"):
        gene_set_enrichment(programs, gene_sets, "gsea")
    with pytest.raises(ValueError, match="n_top_genes=0"):
        gene_set_enrichment(programs, gene_sets, n_top_genes=0)
    programs.iloc[1, 3] = np.nan
    with pytest.raises(ScreenError, match="latent_1"):
        gene_set_enrichment(programs, gene_sets)
