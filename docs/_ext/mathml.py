"""Formulas as MathML, which every browser draws by itself: no script, no internet, no TeX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

_CONVERTER = LatexToMathML(fancy_error=False)
_LOGGER = logging.getLogger(__name__)


def _mathml(node: nodes.Element, latex: str, display: bool) -> str:
    try:
        return _CONVERTER.convert_with_local_state(latex, displaystyle=display)
    except LatexError as error:
        _LOGGER.warning("formula %r: %s", latex, error, location=node)
        return ""


def _visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_mathml(node, node.astext(), display=False))
    raise nodes.SkipNode


def _visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    latex = node.astext()
    if "\\\\" in latex and "\\begin" not in latex:
        latex = f"\\begin{{aligned}}{latex}\\end{{aligned}}"
    self.body.append(f'<div class="math">{_mathml(node, latex, display=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
