"""``llms.txt``: every page in a line, in the form that https://llmstxt.org describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.addnodes import toctree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment


def _below(env: BuildEnvironment, page: str) -> Iterator[str]:
    """A page and all pages below it, in the order of the tables of contents."""
    yield page
    for child in env.toctree_includes.get(page, []):
        yield from _below(env, child)


def _summary(env: BuildEnvironment, page: str) -> str:
    """First sentence of a page."""
    paragraph = next(env.get_doctree(page).findall(nodes.paragraph), None)
    text = " ".join(paragraph.astext().split()) if paragraph else ""
    return text.split(". ")[0].rstrip(".:")


def _write(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    env, root = app.env, app.config.root_doc
    lines = [f"# {app.config.project}", "", f"> {_summary(env, root)}."]
    for contents in env.get_doctree(root).findall(toctree):
        lines += ["", f"## {contents['caption']}", ""]
        for entry in contents["includefiles"]:
            for page in _below(env, entry):
                link = f"[{env.titles[page].astext()}]({app.builder.get_target_uri(page)})"
                lines.append(f"- {link}: {_summary(env, page)}")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
