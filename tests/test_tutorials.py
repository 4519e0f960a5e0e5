"""The tutorials run from top to bottom, on small settings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import scanpy as sc

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
REAL_SCREENS = {
    "02_interferon_gamma": "papalexi2021_eccite.h5ad",
    "03_pairs": "norman2019_subset.h5ad",
}


def _run(tutorial: Path, tmp_path: Path, monkeypatch) -> dict[str, object]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCVI_SAMS_TUTORIALS", "small")
    monkeypatch.setattr(sc.settings, "autoshow", False)
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(compile(tutorial.read_text(), str(tutorial), "exec"), namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_runs_without_real_screens(tutorial, tmp_path, monkeypatch):
    monkeypatch.delenv("SCVI_SAMS_TEST_DATA", raising=False)
    monkeypatch.setenv("SCVI_SAMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", _offline)
    _run(tutorial, tmp_path, monkeypatch)


def _offline(*args: object, **kwargs: object) -> None:
    raise OSError("offline in the tests")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", REAL_SCREENS)
def test_runs_on_the_real_screen(name, request, tmp_path, monkeypatch):
    fixture = {"02_interferon_gamma": "papalexi_path", "03_pairs": "norman_path"}[name]
    screen = request.getfixturevalue(fixture)
    monkeypatch.setenv("SCVI_SAMS_TEST_DATA", str(screen.parent))
    namespace = _run(ROOT / "tutorials" / f"{name}.py", tmp_path, monkeypatch)
    used = namespace["adata" if name == "02_interferon_gamma" else "screen"]
    assert {"IFNGR1", "STAT1"} <= set(used.var_names) or "KLF1" in " ".join(
        used.obs["perturbation"].cat.categories
    )


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_is_a_notebook_with_prose(tutorial):
    text = tutorial.read_text()
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
    prose = [cell for cell in cells if cell.startswith(" [markdown]")]
    assert prose[0].splitlines()[1].startswith("# # "), "starts with a title"
    assert len(prose) >= len(cells) / 3
    for cell in prose:  # a line of prose that lost its hash would run as code
        assert all(line.startswith("#") for line in cell.splitlines()[1:] if line.strip())
    ast.parse(text)
