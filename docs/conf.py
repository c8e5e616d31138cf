"""Configuration of the documentation: in ``make doc`` a warning is an error."""

import inspect
import pathlib
import shutil

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
    "myst_nb",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
# Defaults as they are written, not as they are evaluated
autodoc_preserve_defaults = True

# The notebooks are shown with the outputs they were committed with
nb_execution_mode = "off"
DOCS = pathlib.Path(__file__).parent
(DOCS / "tutorials").mkdir(exist_ok=True)
for notebook in (DOCS.parent / "examples" / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, DOCS / "tutorials")

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

html_theme = "sphinx_rtd_theme"
html_title = f"sb3_softvalue {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"navigation_depth": 3}


# Sphinx takes the types of a class's arguments from the class's attributes of the same name
sb3_softvalue.SACV.__annotations__["policy"] = inspect.signature(sb3_softvalue.SACV.__init__).parameters["policy"].annotation


def escape(app, what, name, obj, options, lines):
    """Docstrings are plain text with ``literals``: the * and | of their mathematics are no markup."""
    of_type = (inspect.getdoc(type(obj)) or "").partition("\n")[0]
    if lines and (lines[0].startswith("Alias for field number") or (what == "data" and lines[0] == of_type)):
        lines.clear()  # the words of namedtuple, or of int, for what has none of its own
    for index, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [part.replace("*", r"\*").replace("|", r"\|") for part in parts[::2]]
        lines[index] = "``".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", escape)
