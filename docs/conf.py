"""How Sphinx builds the manual: `sphinx-build -n -W docs build/docs`."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "robusttrain"
release = metadata.version("robusttrain")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "plain_docstrings",
    "components",
    "config_reference",
]

html_theme = "furo"
html_title = "robusttrain"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["manual.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
# Headings have the same anchors as on GitHub, for links such as guides/figures.md#the-audit.
myst_heading_anchors = 3

napoleon_google_docstring = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

nitpicky = True
# Types of other projects, whose inventories would have to be downloaded for every build.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|nn|np|numpy|pd|pandas|matplotlib|omegaconf|collections|contextlib|pathlib|enum|typing|abc)(\..*)?",
    ),
    (
        r"py:.*",
        r"(Tensor|Figure|Path|Any|Callable|Iterator|Iterable|Mapping|Sequence|Self|ABC|T|Enum)",
    ),
    # A type variable.
    (r"py:.*", r"robusttrain\.errors\.T"),
    (r"py:.*", r"(AbstractContextManager|StrEnum|NamedTuple|Protocol|ValueError|optional)"),
]
