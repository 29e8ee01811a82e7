"""The documentation site: Markdown pages, formulas as MathML, the API from docstrings; no page asks the network."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

from bigram_circuits import __version__  # noqa: E402

project = "bigram_circuits"
author = "The authors of bigram_circuits"
version = release = __version__
html_title = f"bigram_circuits {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "command_line",
    "page_sections",
    "notebook_pages",
]
exclude_patterns = ["_build", "_extensions"]
nitpicky = True
nitpick_ignore_regex = [  # what other packages define has no page here
    ("py:.*", r"(abc|collections(\.abc)?|io|jaxtyping|numpy|os|pathlib|torch|typing)\..*"),
    ("py:class", r"bigram_circuits\.(bitmasks\.M|learning\.found\.F|tasks\.answers\.Answers|models\.nodes\.NodeSite)"),
    ("py:class", r"bigram_circuits\.(masking\.(candidates\.Candidates|gates\.Slots)|replacement\.Pairs)"),
    (
        "py:class",
        r"bigram_circuits\.(bitmasks\.BitMasks|masking\.gates\.Adversary|experiments\.comparison\.Repetition)",
    ),
    ("py:exc", "NotShownError"),  # a ValueError, told apart by `analyze`
    ("py:.*", r"(Any|Callable|Tensor|(np\.)?ndarray|nn\.Module|Mapping|Sequence|Iterator|Path|os\.PathLike)"),
]

# Pages
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

# API
default_role = "literal"  # a name in backticks, in a docstring
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = False
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
toc_object_entries = False

# Look
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "tango"


def keep_whole(app, what, name, obj, options, lines):
    """Keep sentences whole: napoleon would take what precedes a colon in them for a type."""
    if what in ("attribute", "data", "property") and lines:
        lines[:0] = ["..", ""]  # an empty comment
    if "Returns:" in lines:
        at = lines.index("Returns:")
        lines[at : at + 2] = [f":returns: {lines[at + 1].strip()}"]


def readable_defaults(app, what, name, obj, options, signature, return_annotation):
    """Write the default of a field with a factory as `...`: Sphinx cannot parse `<factory>`."""
    return (signature or "").replace("<factory>", "...") or signature, return_annotation


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", readable_defaults)
    app.connect("autodoc-process-docstring", keep_whole, priority=400)  # before napoleon's, at 500
