"""The tutorials run from top to bottom, and the notebooks beside them are their last run."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import jupytext
import pytest
import scanpy as sc

import scvi_sams

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
PICTURES = ROOT / "docs" / "_static" / "pictures"
REAL_SCREENS = {  # the fixture, the name of the screen in the tutorial, a perturbation of it
    "02_interferon_gamma": ("papalexi_path", "adata", "CAV1"),
    "03_pairs": ("norman_path", "screen", "KLF1"),
    "07_guides": ("papalexi_path", "adata", "CAV1"),
}
AT_MOST = {"n_cells": 2_000, "n_genes": 100, "n_perturbations": 12}

of_libraries = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore:The set_bad function:PendingDeprecationWarning",  # of scanpy, under matplotlib 3.11
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small simulated screens, short training, an empty folder."""
    simulate, train = scvi_sams.datasets.simulated_screen, scvi_sams.SAMSVAE.train

    def small_screen(*args: Any, **kwargs: Any) -> Any:
        asked = inspect.signature(simulate).bind(*args, **kwargs)
        asked.apply_defaults()
        sizes = {name: min(asked.arguments[name], size) for name, size in AT_MOST.items()}
        return simulate(**(asked.arguments | sizes))

    def short_training(self: Any, max_epochs: int | None = None, **kwargs: Any) -> None:
        train(self, max_epochs=min(max_epochs or 5, 5), **kwargs)

    monkeypatch.setattr(scvi_sams.datasets, "simulated_screen", small_screen)
    monkeypatch.setattr(scvi_sams.SAMSVAE, "train", short_training)
    monkeypatch.chdir(tmp_path)
    shown, sc.settings.autoshow = sc.settings.autoshow, False  # a property: no monkeypatch
    yield
    sc.settings.autoshow = shown


def _run(name: str) -> dict[str, object]:
    namespace: dict[str, object] = {"__name__": "__main__"}
    path = ROOT / "tutorials" / f"{name}.py"
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace


def _stand_in(name: str) -> Any:
    """A simulated screen with the names of a public one, which is not fetched in the tests."""
    papalexi = ["IFNGR1", "IFNGR2", "JAK2", "STAT1", "SMAD4", "IRF1"]
    names = {f"P{i:03d}": target for i, target in enumerate(papalexi, start=1)}
    if name != "papalexi_2021":
        return scvi_sams.datasets.simulated_screen()
    screen = scvi_sams.datasets.simulated_screen(n_pairs=0, control_fraction=0.3)
    labels = screen.obs["perturbation"].astype(str)
    labels = labels.replace(names)
    screen.obs["perturbation"] = labels.astype("category")
    screen.obs["guide_ID"] = [f"{name}g{number % 2}" for number, name in enumerate(labels)]
    screen.var_names = [*papalexi, *screen.var_names[len(papalexi) :]]  # targets are measured
    return screen


@pytest.mark.slow
@of_libraries
@pytest.mark.parametrize("name", [path.stem for path in TUTORIALS])
def test_runs_without_real_screens(name, small, monkeypatch):
    monkeypatch.setattr(scvi_sams.datasets, "public_screen", _stand_in)
    _run(name)


@pytest.mark.slow
@of_libraries
@pytest.mark.parametrize("name", REAL_SCREENS)
def test_runs_on_the_real_screen(name, request, small):
    fixture, variable, perturbation = REAL_SCREENS[name]
    screen = request.getfixturevalue(fixture)
    cells = sc.read_h5ad(screen)
    cells[:: max(cells.n_obs // 5_000, 1)].copy().write_h5ad(screen.name)
    namespace = _run(name)
    assert perturbation in set(namespace[variable].obs["perturbation"])


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_is_a_notebook_with_prose(tutorial):
    text = tutorial.read_text()
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
    prose = [cell for cell in cells if cell.startswith(" [markdown]")]
    assert prose[0].splitlines()[1].startswith("# # "), "starts with a title"
    assert len(prose) >= len(cells) / 3
    for cell in prose:  # a line of prose that lost its hash would run as code
        assert all(line.startswith("#") for line in cell.splitlines()[1:] if line.strip())
        assert "{" not in re.sub(r"`[^`]*`|```.*?```", "", cell, flags=re.DOTALL), (
            "GitHub knows no roles of Sphinx"
        )
    ast.parse(text)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_notebook_is_in_step_with_its_text(tutorial):
    text, notebook = jupytext.read(tutorial), jupytext.read(tutorial.with_suffix(".ipynb"))
    cells = [
        [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in form.cells]
        for form in (text, notebook)
    ]
    assert cells[0] == cells[1], f"run ./scripts/notebooks {tutorial.stem}"


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_notebook_has_the_outputs_of_one_run(tutorial):
    cells = jupytext.read(tutorial.with_suffix(".ipynb")).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs) or (
        tutorial.stem == "05_large_screens"
    )
    assert all(o.output_type != "error" and o.get("name") != "stderr" for o in outputs)


def test_notebooks_and_pictures_are_small():
    written = [path.with_suffix(".ipynb") for path in TUTORIALS]
    assert sum(path.stat().st_size for path in written) < 3e6
    assert all(path.stat().st_size < 150e3 for path in PICTURES.glob("*.png"))


def test_pictures_are_those_of_the_notebooks():
    tags = set(re.findall(r'"picture:(\w+)"', "".join(p.read_text() for p in TUTORIALS)))
    assert {path.stem for path in PICTURES.glob("*.png")} == tags
    readers = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs/tutorials/index.md"]
    shown = set(re.findall(r"pictures/(\w+)\.png", "".join(p.read_text() for p in readers)))
    assert shown == tags
