from __future__ import annotations

import pytest

from scvi_sams import ScreenError
from scvi_sams.tl import measured_gene_sets, read_gene_sets


@pytest.fixture
def gmt(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("ONE\tfirst set\tA\tB\tA\t\n\nTWO\t\tB,0.5\tC\r\n")
    return path


class TestReadGeneSets:
    def test_file(self, gmt):
        assert read_gene_sets(gmt) == {"ONE": ["A", "B"], "TWO": ["B", "C"]}
        assert read_gene_sets(str(gmt)) == read_gene_sets(gmt)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ONE\tdescription\n", r"Line 1 of sets\.gmt"),
            ("ONE\tx\tA\nTWO A B\n", r"Line 2 of sets\.gmt"),
            ("ONE\tx\tA\nONE\tx\tB\n", "'ONE' twice"),
            ("\n", "no gene set"),
        ],
    )
    def test_broken(self, gmt, text, message):
        gmt.write_text(text)
        with pytest.raises(ScreenError, match=message):
            read_gene_sets(gmt)

    def test_missing(self, tmp_path):
        with pytest.raises(ScreenError, match=r"none\.gmt"):
            read_gene_sets(tmp_path / "none.gmt")


class TestMeasuredGeneSets:
    def test_membership(self, gmt):
        genes = ["C", "B", "X", "A"]
        measured = measured_gene_sets(gmt, genes, min_genes=2)
        assert measured.names == ["ONE", "TWO"]
        for column, members in enumerate([{"A", "B"}, {"B", "C"}]):
            found = measured.membership.toarray()[:, column]
            assert found.tolist() == [float(gene in members) for gene in genes]

    def test_size(self):
        sets = {"SMALL": "AB", "FITS": ["A", "B", "C"], "LARGE": list("ABCD")} | {"SMALL": ["A"]}
        genes = list("ABCDE")
        assert measured_gene_sets(sets, genes, 2, 3).names == ["FITS"]
        with pytest.raises(ScreenError, match="None of 3 gene sets"):
            measured_gene_sets(sets, genes, 5)
        with pytest.raises(ValueError, match="min_genes=3, max_genes=2"):
            measured_gene_sets(sets, genes, 3, 2)

    def test_refuses_text_and_repeats(self):
        with pytest.raises(ScreenError, match="'ONE' is the text 'STAT1'"):
            measured_gene_sets({"ONE": "STAT1"}, ["STAT1"], 1)
        with pytest.raises(ScreenError, match="twice"):
            measured_gene_sets({"ONE": ["A"]}, ["A", "A"], 1)
