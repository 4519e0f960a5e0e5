"""Objects are documented, and linked to, under their public names.

The code lives in private modules and is re-exported. What follows from that: references by a
private or a bare name are led to the public one, constants get the docstring that follows their
definition, and a class page lists the members that this package defines, not all that
scvi-tools' base classes bring.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any

from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment
    from sphinx.ext.autodoc import Options

_PACKAGE = "scvi_sams"


def own_members(module: str, class_name: str) -> dict[str, list[str]]:
    """Public members of a class that this package defines, and the methods that it inherits."""
    cls = getattr(importlib.import_module(module), class_name)
    attributes, methods, inherited = [], [], []
    for name in dir(cls):
        if name.startswith("_") or (issubclass(cls, tuple) and name in {"count", "index"}):
            continue
        owner = next((base for base in cls.__mro__ if name in vars(base)), cls)
        member = inspect.getattr_static(cls, name)
        is_method = isinstance(member, classmethod | staticmethod) or inspect.isfunction(member)
        ours = owner.__module__.startswith(_PACKAGE)
        if is_method:
            (methods if ours else inherited).append(name)
        elif ours and isinstance(member, property):
            attributes.append(name)
    documented_fields = {
        field: None
        for owner, field in ModuleAnalyzer.for_module(cls.__module__).find_attr_docs()
        if owner == cls.__name__ and not field.startswith("_")
    }
    attributes = [
        *documented_fields,
        *(name for name in attributes if name not in documented_fields),
    ]
    if not any(base.__module__.startswith("scvi.") for base in cls.__mro__):
        inherited = []  # those of torch and of the standard library are known well enough
    return {"attributes": attributes, "methods": methods, "inherited": inherited}


def _documented_constant(name: str) -> list[str] | None:
    """Docstring of a constant, from the private module that defines it."""
    package, _, attribute = name.rpartition(".")
    for module in sorted(sys.modules):
        if module.startswith(f"{package}._"):
            docs = ModuleAnalyzer.for_module(module).find_attr_docs()
            if ("", attribute) in docs:
                return docs["", attribute]
    return None


def _replace_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Options, lines: list[str]
) -> None:
    if what == "data" and name.startswith(_PACKAGE):
        lines[:] = _documented_constant(name) or []


def _names(public_name: str, tail: str) -> bool:
    """Whether a name documented here ends so, members of classes left out unless asked for."""
    if not public_name.startswith(f"{_PACKAGE}.") or not public_name.endswith(f".{tail}"):
        return False
    owner = public_name.removesuffix(f".{tail}").rpartition(".")[2]
    return owner.islower()


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element
) -> Element | None:
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    target = node["reftarget"].lstrip("~.")
    # "SAMSVAE.train" names the class too; of a dotted path the last part is the public name.
    tail = target if target.count(".") == 1 and target[0].isupper() else target.split(".")[-1]
    is_bare_method = tail == target and target.islower() and "." not in target
    found = [] if is_bare_method else [name for name in domain.objects if _names(name, tail)]
    if len(found) != 1:
        return None
    entry = domain.objects[found[0]]
    return make_refnode(
        app.builder, node.get("refdoc", env.docname), entry.docname, entry.node_id, contnode
    )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _replace_docstring, priority=100)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
