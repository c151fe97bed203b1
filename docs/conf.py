"""The site: ``sphinx-build -W docs site`` builds it, and runs the gallery.

CYBN_GALLERY_SEEDS is the number of seeds of each gallery script, 5 by default.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

import cybn

project = "cybn"
author = copyright = "The cybn developers"
version = release = cybn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery", "examples"]
templates_path = ["_templates"]
suppress_warnings = ["config.cache"]  # a class in the gallery's settings cannot be pickled

# Pages in Markdown. Headings have the anchors that GitHub gives them.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# The reference, from the docstrings.
autosummary_generate = True
autodoc_typehints = "none"  # the docstrings describe the types in words
# Packages that are not installed are mocked, because the pages need only the docstrings.
autodoc_mock_imports = [name for name in ("dask", "mpi4py", "torch") if not find_spec(name)]
numpydoc_show_class_members = False
numpydoc_validation_checks = {
    *("GL01", "GL03", "GL07", "GL08", "GL09"),  # docstrings exist, with sections in the usual order
    *("PR02", "PR10", "SS02", "SS06"),  # documented parameters exist; the summary is one line
}
numpydoc_validation_exclude = {r"\.__\w+__$"}

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": "/plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 0,
    "write_computation_times": False,
    "capture_repr": (),  # show what scripts print, but not the value of their last line
    "image_scrapers": ("matplotlib",),
    "matplotlib_animations": False,
    "abort_on_example_error": True,
}
os.environ.setdefault("CYBN_GALLERY_SEEDS", "5")

html_theme = "pydata_sphinx_theme"
html_title = f"cybn {version}"  # in the header of each page
html_favicon = "_static/cybn.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["cybn.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "install": [], "auto_gallery/index": []}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "back_to_top_button": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def _inline_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block_math(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>\n')
    raise nodes.SkipNode


def _gallery_links(app: Any, name: str, source: list[str]) -> None:
    """Replace links to a gallery script, as they work in the repository, by links to its page."""
    text = re.sub(r"\]\(gallery/(plot_\w+)\.py\)", r"](auto_gallery/\1.rst)", source[0])
    source[0] = text.replace("](gallery/README.rst)", "](auto_gallery/index.rst)")


def setup(app: Any) -> None:
    """Write formulas in MathML, which browsers draw without a script from another site."""
    app.connect("source-read", _gallery_links)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))


html_math_renderer = "mathml"
