"""The documentation says what is there: every public name, and no call that does not exist."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

import scvi_sams
from scvi_sams.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
SUBPACKAGES = [
    name
    for name in scvi_sams.__all__
    if inspect.ismodule(getattr(scvi_sams, name)) and name != "model"
]


def _documented() -> dict[str, list[str]]:
    """Names listed in the API pages, by module."""
    names: dict[str, list[str]] = {}
    for page in (DOCS / "api").glob("*.md"):
        for block in re.findall(r"```\{eval-rst\}\n(.*?)```", page.read_text(), re.DOTALL):
            (module,) = re.findall(r"currentmodule:: (\S+)", block)
            listed = re.findall(r"^ {3}(\w+)$", block, re.MULTILINE)
            names.setdefault(module, []).extend(listed)
    return names


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_every_public_name_is_in_the_reference(subpackage):
    listed = _documented().get(f"scvi_sams.{subpackage}", [])
    assert sorted(listed) == sorted(getattr(scvi_sams, subpackage).__all__)


def test_models_and_errors_are_in_the_reference():
    listed = _documented()["scvi_sams"]
    public = [n for n in scvi_sams.__all__ if not inspect.ismodule(getattr(scvi_sams, n))]
    assert sorted(listed) == sorted(public)
    assert set(scvi_sams.model.__all__) <= set(listed)


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _dotted(node: ast.expr) -> list[str] | None:
    """``["scvi_sams", "pl", "scorecard"]`` of such an expression; None of any other."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)):
        return [*owner, node.attr]
    return None


def _resolve(path: list[str]) -> object:
    """What a path of the snippets stands for: ours, or a method of a model."""
    if path[0] == "scvi_sams":
        found: object = scvi_sams
    elif path[0] in {"model", "query"}:
        found = scvi_sams.SAMSVAE
    elif path[0] == "card":
        found = scvi_sams.evaluation.Scorecard
    else:
        return None
    for name in path[1:]:
        instance_only = {"validation_indices"} | set(inspect.get_annotations(found))  # type: ignore[arg-type]
        if name in instance_only:
            return None
        found = getattr(found, name)
    return found


_SNIPPETS = [(page, block) for page in PAGES for block in _blocks(page, "python")]


@pytest.mark.parametrize(
    ("page", "block"), _SNIPPETS, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(_SNIPPETS)]
)
def test_snippets_call_what_exists(page, block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (path := _dotted(node)):
            _resolve(path)  # AttributeError if there is no such name
        if isinstance(node, ast.Call) and (path := _dotted(node.func)):
            called = _resolve(path)
            if called is None or any(k.arg is None for k in node.keywords):
                continue
            signature = inspect.signature(called)  # type: ignore[arg-type]
            arguments = {str(keyword.arg): None for keyword in node.keywords}
            bound_to = [None] if path[0] in {"model", "query", "card"} else []
            static = (
                path[0] == "scvi_sams"
                and inspect.isfunction(called)
                and "self" in (signature.parameters)
            )
            assert not static, f"{page.name}: {'.'.join(path)} needs a model"
            if inspect.ismethod(called):
                bound_to = []
            signature.bind_partial(*bound_to, *([None] * len(node.args)), **arguments)


def test_snippets_are_many():
    assert len(_SNIPPETS) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_exist(page):
    for block in _blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words[0] == "scvi-sams":
                build_parser().parse_args(words[1:])
            elif words[0].startswith("./scripts/"):
                assert (ROOT / words[0]).stat().st_mode & 0o100
            elif words[:1] == ["python"]:
                assert (ROOT / words[1]).is_file()


def test_pages_are_reachable():
    """Every page is in a table of contents."""
    listed = set()
    for page in PAGES:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            for entry in block.split():
                listed.add((page.parent / entry).relative_to(DOCS).as_posix())
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    tutorials = {f"tutorials/{path.stem}" for path in (ROOT / "tutorials").glob("[0-9]*.py")}
    assert (pages | tutorials) - {"index"} <= listed


def test_every_analysis_and_plot_answers_a_question():
    """On the page for those who know what they want and not what it is called."""
    page = (DOCS / "which_function.md").read_text()
    named = set(re.findall(r"<(scvi_sams\.\w+\.\w+)>`", page))
    public = {f"scvi_sams.tl.{name}" for name in scvi_sams.tl.__all__}
    assert public | {f"scvi_sams.pl.{name}" for name in scvi_sams.pl.__all__} <= named


def test_every_plot_is_in_the_gallery():
    gallery = (ROOT / "tutorials" / "06_gallery.py").read_text()
    drawn = set(re.findall(r"^[^#\n]*scvi_sams\.pl\.(\w+)\(", gallery, re.MULTILINE))
    assert drawn == set(scvi_sams.pl.__all__)
