"""The tutorials run from top to bottom, on small settings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import scanpy as sc

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
REAL_SCREENS = {  # the fixture, the name of the screen in the tutorial, a perturbation of it
    "02_interferon_gamma": ("papalexi_path", "adata", "STAT1"),
    "03_pairs": ("norman_path", "screen", "KLF1"),
}

of_libraries = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore:The set_bad function:PendingDeprecationWarning",  # of scanpy, under matplotlib 3.11
)


def _run(tutorial: Path, tmp_path: Path, monkeypatch) -> dict[str, object]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCVI_SAMS_TUTORIALS", "small")
    namespace: dict[str, object] = {"__name__": "__main__"}
    shown, sc.settings.autoshow = sc.settings.autoshow, False
    try:
        exec(compile(tutorial.read_text(), str(tutorial), "exec"), namespace)
    finally:
        sc.settings.autoshow = shown
    return namespace


@pytest.mark.slow
@of_libraries
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_runs_without_real_screens(tutorial, tmp_path, monkeypatch):
    monkeypatch.delenv("SCVI_SAMS_TEST_DATA", raising=False)
    monkeypatch.setenv("SCVI_SAMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", _offline)
    _run(tutorial, tmp_path, monkeypatch)


def _offline(*args: object, **kwargs: object) -> None:
    raise OSError("offline in the tests")


@pytest.mark.slow
@of_libraries
@pytest.mark.parametrize("name", REAL_SCREENS)
def test_runs_on_the_real_screen(name, request, tmp_path, monkeypatch):
    fixture, variable, perturbation = REAL_SCREENS[name]
    screen = request.getfixturevalue(fixture)
    monkeypatch.setenv("SCVI_SAMS_TEST_DATA", str(screen.parent))
    namespace = _run(ROOT / "tutorials" / f"{name}.py", tmp_path, monkeypatch)
    assert perturbation in set(namespace[variable].obs["perturbation"])  # not the simulated one


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
