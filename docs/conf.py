"""Sphinx settings of the documentation: `make docs`. Nothing is fetched, neither when building nor when viewing."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from hf_kdtl import __version__  # noqa: E402

project, author, copyright = "hf_kdtl", "hf_kdtl contributors", "hf_kdtl contributors, Apache-2.0"
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # MathJax with its fonts, out of a package, in place of a content delivery network
    "docstrings",
    "methods",
    "pages",
]
exclude_patterns = ["_build", "notebooks/*.ipynb"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"hf_kdtl {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = html_show_sourcelink = False

default_role = "code"  # single backticks in docstrings
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # Trainer's own are in its documentation
maximum_signature_line_length = 88
python_display_short_literal_types = True
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
