"""Pages that a person looks at: one HTML file each, which needs no network and no script.

`document` renders templates, `figures` draws, and `formats` writes numbers. The template
`base.html` has the frame of all pages, `macros.html` the parts that they share, and `style.css`
their looks.
"""
