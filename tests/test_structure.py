"""Seven concepts, one direction: who may import whom, and which doors tests go through."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import scvi_sams
from benchmarks.structure import circles, files_run, import_graph, imports

PACKAGE = Path(scvi_sams.__file__).parent
TESTS = Path(__file__).resolve().parent
SHARED = {"_arguments", "_constants", "_exceptions", "_compat"}
# What each part may import besides itself and what all share.
BELOW = {
    "data": set(),
    "module": set(),
    "train": {"data", "module"},
    "model": {"data", "module", "train"},
    "tl": {"data", "module", "train", "model"},
    "evaluation": {"data", "module", "train", "model", "tl"},
    "pl": {"data", "tl", "evaluation"},
    "datasets": {"data", "evaluation"},
    "cli": {"data", "model", "tl", "evaluation", "pl", "datasets"},
}
GRAPH = import_graph(PACKAGE, "scvi_sams", hints=True)


def part(module: str) -> str:
    """``"data"`` of ``"scvi_sams.data.field"``; the package itself is the empty string."""
    return module.removeprefix("scvi_sams").removeprefix(".").split(".")[0]


def test_every_part_has_its_place():
    assert {part(module) for module in GRAPH} == BELOW.keys() | SHARED | {"", "__main__"}


@pytest.mark.parametrize("module", [m for m in GRAPH if part(m) in BELOW])
def test_imports_point_one_way(module):
    """Those of type hints too."""
    own = part(module)
    others = {part(target) for target in GRAPH[module]} - {own, ""} - SHARED
    assert others <= BELOW[own], f"{module} imports {sorted(others - BELOW[own])}"


def test_what_all_share_imports_nothing():
    for module in SHARED:
        assert {part(t) for t in GRAPH[f"scvi_sams.{module}"]} <= SHARED


def test_no_circles():
    assert circles(import_graph(PACKAGE, "scvi_sams")) == []


class TestTools:
    """The tools above see what they are to see."""

    @pytest.fixture
    def package(self, tmp_path):
        files = {
            "__init__": "",
            "a": "from odd import b\n",
            "b": "import odd.c\nfrom typing import TYPE_CHECKING\n",
            "c": "from odd.a import f\n",
            "d": "if TYPE_CHECKING:\n    from odd.a import f\n",
        }
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        return tmp_path

    def test_circles(self, package):
        assert circles(import_graph(package, "odd")) == [["odd.a", "odd.b", "odd.c"]]

    def test_hints(self, package):
        assert imports(package, "odd", "odd.d") == set()
        assert imports(package, "odd", "odd.d", hints=True) == {"odd.a"}

    def test_files_run(self):
        files = files_run(lambda: scvi_sams._exceptions.nearest("a", ["ab"]), PACKAGE)
        assert files == {"_exceptions.py"}


def library_names(tree: ast.AST) -> set[str]:
    """Names that imports of other libraries bind."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names}
    return names - {"scvi_sams"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_uses(tree: ast.AST) -> list[str]:
    """Private modules and names of other libraries that a file takes."""
    found = []
    libraries = library_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("scvi_sams"):
            path = [*(node.module or "").split("."), *(a.name for a in node.names)]
            if any(map(is_private, path)) or node.module == "anndata.compat":
                found.append(f"{node.lineno}: {node.module}")
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: {a.name}" for a in node.names if "._" in a.name]
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in libraries:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    ["from anndata.compat import X", "import torch._dynamo", "import torch as t\nt._C.f()"],
)
def test_private_names_are_seen(source):
    assert private_uses(ast.parse(source))


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_compat.py"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_private_names_of_other_libraries_are_in_one_file(path):
    assert private_uses(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(TESTS.rglob("*.py")) if not p.is_relative_to(TESTS / "frozen")],
    ids=lambda path: str(path.relative_to(TESTS)),
)
def test_tests_go_through_open_doors(path):
    """Faces of packages and plain modules; what all parts share is open to tests as well."""
    taken = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scvi_sams"):
            names = [*node.module.split("."), *(a.name for a in node.names)]
            taken |= {n for n in names if is_private(n)}
        if isinstance(node, ast.Import):
            taken |= {n for a in node.names for n in a.name.split(".") if is_private(n)}
    assert taken <= SHARED
