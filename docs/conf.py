"""Configuration of the documentation: ``make doc`` builds it with every warning an error."""

import sb3_softvalue

project = "sb3_softvalue"
author = "The sb3_softvalue developers"
copyright = "The sb3_softvalue developers, MIT licence"
version = release = sb3_softvalue.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
# Defaults as they are written, not as they are evaluated
autodoc_preserve_defaults = True

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

html_theme = "sphinx_rtd_theme"
html_title = f"sb3_softvalue {release}"
html_theme_options = {"navigation_depth": 3}


def escape(app, what, name, obj, options, lines):  # noqa: ANN001, PLR0913
    """Docstrings are plain text with ``literals``: the * and | of their mathematics are no markup."""
    for index, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [part.replace("*", r"\*").replace("|", r"\|") for part in parts[::2]]
        lines[index] = "``".join(parts)


def setup(app):  # noqa: ANN001
    app.connect("autodoc-process-docstring", escape)
