"""Napoleon takes every line of a ``Returns`` section for a type; ours are prose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sphinx.ext.napoleon import NumpyDocstring

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def _parse_returns_section(self: NumpyDocstring, section: str) -> list[str]:
    lines = self._dedent(self._consume_to_next_section())
    while lines and not lines[-1].strip():
        lines.pop()
    return [*self._format_block(":returns: ", lines), ""] if lines else []


def setup(app: Sphinx) -> dict[str, bool]:
    NumpyDocstring._parse_returns_section = _parse_returns_section  # type: ignore[method-assign]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
