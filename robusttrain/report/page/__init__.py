"""Pages that a person looks at: one HTML file each, which needs no network and no script.

`document` renders templates, `figures` draws, and `formats` writes numbers. The template
`base.html` has the frame of all pages, `macros.html` the parts that they share, and `style.css`
their looks.
"""

from enum import StrEnum


class Page(StrEnum):
    """Whether a run or a sweep ends with a page: `report.html` or `sweep.html`."""

    html = "html"
    none = "none"
