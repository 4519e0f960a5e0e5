"""Sphinx: the user guide, the tutorials and the API reference."""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "_ext"))

from public_names import own_members  # noqa: E402

project = "scvi_sams"
author = "scvi_sams contributors"
copyright = "2026, scvi_sams contributors"
release = version = installed_version("scvi-sams")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "llms_txt",
    "mathml",
    "public_names",
]
exclude_patterns = ["_build", "_ext"]
templates_path = ["_templates"]

# Sphinx reads what is below its own folder only.
for notebook in sorted((ROOT / "tutorials").glob("[0-9]*.ipynb")):
    copy = HERE / "tutorials" / notebook.name
    if not copy.exists() or not filecmp.cmp(notebook, copy, shallow=False):
        shutil.copyfile(notebook, copy)

nb_execution_mode = "off"  # scripts/notebooks runs them
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
html_math_renderer = "mathml"

autosummary_generate = True
autosummary_context = {"own_members": own_members}
suppress_warnings = ["config.cache"]  # a function in autosummary_context cannot be pickled
autodoc_typehints = "description"
toc_object_entries_show_parents = "hide"  # names of methods fit beside the page without them
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = True
napoleon_use_param = True
napoleon_custom_sections = ["Returns"]  # prose, not a list of types

# Every reference of ours must lead somewhere; those into other libraries need the internet.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!scvi_sams\b).*"),
    ("py:.*", r"scvi_sams(\.\w+)*\._.*"),  # what is private has no page
    # Nor have the files of the packages for developers: a reference says where to look.
    ("py:.*", r"scvi_sams\.(data|module|train|model)\.[a-z_]+\.\w.*"),
]
if os.environ.get("SCVI_SAMS_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

html_theme = "sphinx_book_theme"
html_title = "scvi_sams"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "navbar_persistent": [],  # the search field is in the side bar
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
