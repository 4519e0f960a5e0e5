"""Run the tutorials and keep them as notebooks with outputs; ``scripts/notebooks`` calls it.

The text form, ``tutorials/NAME.py``, is the source; ``tutorials/NAME.ipynb`` beside it is what
GitHub and the documentation show. The last picture of a cell with a tag ``picture:NAME`` also
goes to ``docs/_static/pictures/NAME.png``, for the README and the landing page.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image  # matplotlib brings it

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "tutorials"
PICTURES = ROOT / "docs" / "_static" / "pictures"
SCREENS = Path(os.environ.get("SCVI_SAMS_TEST_DATA", ROOT.parent / "shared" / "data"))


def _code(notebook: Any) -> list[str]:
    """What the cells do, whatever their comments and line breaks."""
    return [ast.dump(ast.parse(c.source)) for c in notebook.cells if c.cell_type == "code"]


def _read(tutorial: Path) -> Any:
    """Notebook of the text form, with names of cells that stay the same from run to run."""
    notebook = jupytext.read(tutorial)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def _execute(notebook: Any) -> None:
    """Run in an empty folder in which the screens of the tests lie, where there are some."""
    with tempfile.TemporaryDirectory() as folder:
        for screen in SCREENS.glob("*.h5ad"):
            (Path(folder) / screen.name).symlink_to(screen)
        NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars and advice say nothing to a reader
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]


def _take_outputs(notebook: Any, earlier: Any) -> None:
    """Outputs of the last run, if it ran the same code."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ran = [cell for cell in earlier.cells if cell.cell_type == "code"]
    for cell, old in zip(code, ran, strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count


def _shrink(picture: str) -> str:
    """PNG with a palette, a third of the size; one that has a palette stays as it is."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    small, on_white = io.BytesIO(), Image.new("RGBA", image.size, "white")
    on_white.alpha_composite(image.convert("RGBA"))
    on_white.convert("RGB").quantize(256, kmeans=2).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def _keep_pictures(notebook: Any) -> None:
    """Make pictures small, and write those with a name."""
    for cell in notebook.cells:
        drawn = []
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _shrink(output.data["image/png"])
                drawn.append(output.data["image/png"])
        for tag in cell.metadata.get("tags", []):
            if tag.startswith("picture:"):
                PICTURES.mkdir(exist_ok=True)
                path = PICTURES / f"{tag.removeprefix('picture:')}.png"
                path.write_bytes(base64.b64decode(drawn[-1]))


def main() -> None:
    """Bring notebooks up to date."""
    parser = argparse.ArgumentParser(prog="scripts/notebooks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_quick_start; all")
    parser.add_argument("--all", action="store_true", help="run those whose code is unchanged too")
    arguments = parser.parse_args()
    found = {path.stem: path for path in sorted(TUTORIALS.glob("[0-9]*.py"))}
    if unknown := set(arguments.names) - set(found):
        parser.error(f"no tutorial {sorted(unknown)}; there are {list(found)}")
    for name in arguments.names or found:
        notebook, written = _read(found[name]), found[name].with_suffix(".ipynb")
        earlier = nbformat.read(written, as_version=4) if written.exists() else None
        if not arguments.all and earlier and _code(notebook) == _code(earlier):
            _take_outputs(notebook, earlier)
            print(f"{name}: code unchanged, outputs kept", flush=True)
        else:
            print(f"{name}: running", flush=True)
            _execute(notebook)
        _keep_pictures(notebook)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, written)


if __name__ == "__main__":
    main()
