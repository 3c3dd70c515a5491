"""Sphinx builds the pages of this folder into a site: `make docs`. The same Markdown reads well where it lies."""

import os
import re
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the reference imports the package, and needs no device

project = "simcse_jax"
author = copyright = "the simcse_jax authors"
release = metadata.version("simcse-jax")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "simcse_jax"
html_show_copyright = False
html_show_sphinx = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
toc_object_entries_show_parents = "hide"

myst_heading_anchors = 4  # as on GitHub; with -W a link to a page, a heading or a file that is not there is an error

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
copybutton_prompt_text = "$ "

CODE_OR_BAR = re.compile(r"(?<!`)`([^`]+)`(?!`)|\|")
RETURNS = re.compile(r"^( *Returns:\n +)", re.MULTILINE)
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
PAGE = re.compile(r"\]\(([\w/]+)\.md\)")
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)\)")


def contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The links of the first page, by its headings, are the site's table of contents: it is kept in one place."""
    if docname == "index":
        parts = SECTION.split(source[0])
        for caption, text in zip(parts[1::2], parts[2::2], strict=True):
            if pages := dict.fromkeys(PAGE.findall(text)):
                source[0] += "\n\n```{toctree}\n:hidden:\n:caption: " + "\n".join([caption, "", *pages, "```"])


def outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links to folders and Markdown of the repository that the site does not hold become text; files are copied."""

    def text(link: re.Match[str]) -> str:
        path = (Path(app.srcdir, docname).parent / link[2]).resolve()
        left_out = path.is_dir() or (path.is_file() and path.suffix == ".md" and Path(app.srcdir) not in path.parents)
        return link[1] if left_out else link[0]

    source[0] = OUTSIDE.sub(text, source[0])


def docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings as they are written here: `code` as in Markdown, |x| a number, no type before a return's colon."""
    text = CODE_OR_BAR.sub(lambda found: f"``{found[1]}``" if found[1] else "\\|", "\n".join(lines))
    lines[:] = RETURNS.sub(r"\1: ", text).split("\n")


def setup(app: Sphinx) -> None:
    """Registers them; docstrings come here before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", docstring, priority=400)
    app.connect("source-read", contents)
    app.connect("source-read", outside)
