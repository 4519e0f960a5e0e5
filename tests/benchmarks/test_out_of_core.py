"""The benchmark of screens on disk: what it writes, and that it runs."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

REASON = "run pytest as `python -m pytest` in the repository"
out_of_core = pytest.importorskip("benchmarks.out_of_core", reason=REASON)


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.mark.parametrize("is_dense", [False, True])
def test_screen_is_written_in_parts(tmp_path, monkeypatch, is_dense):
    monkeypatch.setattr(out_of_core, "_CELLS_AT_ONCE", 400)
    path = tmp_path / "screen.h5ad"
    out_of_core.write_random_screen(path, 1_000, 60, 9, is_dense)
    screen = anndata.read_h5ad(path)
    assert isinstance(screen.X, np.ndarray) == is_dense
    screen.X = sparse.csr_matrix(screen.X)
    assert [found.name for found in tmp_path.iterdir()] == ["screen.h5ad"]
    assert screen.shape == (1_000, 60)
    assert screen.X.has_canonical_format
    assert 0.04 < screen.X.nnz / np.prod(screen.shape) <= 0.05
    assert screen.obs["perturbation"].value_counts().between(90, 110).all()
    assert screen.obs["perturbation"].nunique() == 10
    parts = screen.X[:400].toarray(), screen.X[400:800].toarray()
    assert (parts[0] != parts[1]).any()


@pytest.mark.slow
def test_rows_are_written(tmp_path, capsys):
    sizes = ["--cells", "600", "--memory-cells", "300", "--genes", "40", "--perturbations", "5"]
    found = tmp_path / "rows.json"
    out_of_core.main([*sizes, "--folder", str(tmp_path), "--json", str(found)])
    rows = json.loads(found.read_text())
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows[0] if name != "table")
    assert [(row["kept"], row["cells"]) for row in rows] == [("device", 300), ("disk", 600)]
    assert rows[0]["cells a second, beside memory"] == 1
    assert min(row["cells a second"] for row in rows) > 0
    assert list(tmp_path.iterdir()) == [found]  # no screen is left
