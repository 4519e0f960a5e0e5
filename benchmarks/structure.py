"""Print how large the package is, and how much of it is read to follow a step and a prediction."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._common import parser, prepare, print_table

if TYPE_CHECKING:
    from collections.abc import Callable

_TYPING = "TYPE_CHECKING"


def imports(path: Path, package: str, name: str, hints: bool = False) -> set[str]:
    """Modules of a package that one of them imports when it is run, or for its hints too."""
    modules = _modules(path, package)
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == _TYPING and not hints:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in modules else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(modules[name].read_text()))
    return {module for module in found if module.split(".")[0] == package}


def _modules(path: Path, package: str) -> dict[str, Path]:
    """Files of a package, by the dotted names of their modules."""
    names = {}
    for file in sorted(path.rglob("*.py")):
        parts = [package, *file.relative_to(path).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def import_graph(path: Path, package: str, hints: bool = False) -> dict[str, set[str]]:
    """What each module of a package imports."""
    names = _modules(path, package)
    return {name: imports(path, package, name, hints) - {name} for name in names}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by whatever way."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph.get(waiting.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        reached[start] = seen
    groups = {
        tuple(sorted(other for other in seen if start in reached.get(other, ())))
        for start, seen in reached.items()
        if start in seen
    }
    return [list(group) for group in sorted(groups)]


def files_run(function: Callable[[], Any], path: Path) -> set[str]:
    """Files below a folder whose functions are called."""
    files: set[str] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(path)):
            files.add(str(Path(frame.f_code.co_filename).relative_to(path)))

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files


def public_names(package: str) -> dict[str, int]:
    """Names that each part of a package offers, those that it takes over from another once."""
    counted: set[int] = set()
    numbers = {}
    module = importlib.import_module(package)
    parts = sorted(m.name for m in pkgutil.iter_modules(module.__path__) if m.ispkg)
    for name in [package, *(f"{package}.{part}" for part in parts)]:
        part = importlib.import_module(name)
        offered = [getattr(part, n) for n in getattr(part, "__all__", ())]
        new = [o for o in offered if not inspect.ismodule(o) and id(o) not in counted]
        counted |= {id(o) for o in new}
        numbers[name.removeprefix(f"{package}.")] = len(new)
    return numbers


def _fitted() -> Any:
    import scvi_sams

    adata = scvi_sams.datasets.simulated_screen(n_cells=600, n_genes=60, n_perturbations=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a screen this small
        scvi_sams.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
        model = scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=16)
        model.train(max_epochs=2, enable_progress_bar=False)
    return model


def _step(model: Any) -> None:
    """What the training plan asks of the module in a step, and an update of the effects."""
    module = model.module.train()
    loader = model._make_data_loader(model.adata, indices=np.arange(128), batch_size=128)
    inference, _, output = module(next(iter(loader)))
    output.loss.backward()
    module.observe(inference)
    module.closed_form.update(module.effects, module.n_training_cells)


def main(arguments: list[str]) -> None:
    """Print the table."""
    import scvi_sams

    args = parser(__doc__ or "").parse_args(arguments)
    prepare(args)
    path = Path(scvi_sams.__file__).parent
    files = sorted(path.rglob("*.py"))
    numbers = public_names("scvi_sams")
    model = _fitted()
    name = model.perturbation_names[0]
    graph = import_graph(path, "scvi_sams")
    of_step = files_run(lambda: _step(model), path)
    of_training = files_run(lambda: model.train(max_epochs=1, enable_progress_bar=False), path)
    of_prediction = files_run(lambda: model.predict([name], n_samples=10), path)
    mro = [c for c in type(model).__mro__ if c.__module__.startswith("scvi_sams")]
    rows = [
        ("files", len(files)),
        ("lines", sum(len(file.read_text().splitlines()) for file in files)),
        ("public names", sum(numbers.values())),
        *((f"public names, {part}", n) for part, n in numbers.items() if n),
        ("classes in the MRO of SAMSVAE", len(type(model).__mro__)),
        ("of them ours", len(mro)),
        ("files run by one training step", len(of_step)),
        ("files run by train()", len(of_training)),
        ("files run by predict()", len(of_prediction)),
        ("circles of imports", len(circles(graph))),
    ]
    print_table("Structure", [{"of the package": what, "n": n} for what, n in rows], args)
    print("\nA step:", ", ".join(sorted(of_step)))
    print("train():", ", ".join(sorted(of_training)))
    print("predict():", ", ".join(sorted(of_prediction)))
