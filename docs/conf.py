"""Sphinx builds the pages of this folder into a site: `make docs`. The same Markdown reads well where it lies."""

import dataclasses
import os
import re
import typing
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

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
html_math_renderer = "mathml"
smartquotes_action = "D"  # dashes alone: quotes stay as they are written, since some belong to code
toc_object_entries_show_parents = "hide"

myst_heading_anchors = 4  # as on GitHub; with -W a link to a page, a heading or a file that is not there is an error
myst_enable_extensions = ["dollarmath"]  # $x$ in a line, as on GitHub
myst_fence_as_directive = ["math"]  # and ```math for a formula of its own

napoleon_numpy_docstring = False  # docstrings are in Google's style
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
copybutton_prompt_text = "$ "

CODE_OR_BAR = re.compile(r"(?<!`)`([^`]+)`(?!`)|\|")
RETURNS = re.compile(r"^( *Returns:\n +)", re.MULTILINE)
SHOWN = re.compile(r"^\.\. auto(?:class|module):: (\S+)$", re.MULTILINE)
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
PAGE = re.compile(r"\]\(([\w/]+)\.md\)")
OBJECT = re.compile(r"(?<== )<[^<>]*>")
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)\)")


BOUNDS: dict[str, str] = {}
"""What the numbers among the settings must be, by the name of the setting."""


def plain_types() -> None:
    """Shows the classes of the reference with their types alone, and their bounds in words, which `docstring` adds."""
    from simcse_jax.config.values import Bound

    named = SHOWN.findall(Path(__file__).with_name("api.md").read_text("utf-8"))
    shown = {name: resolve_name(name) for name in named}
    modules = {name: vars(module) for name, module in shown.items() if isinstance(module, ModuleType)}
    shown |= {f"{module}.{name}": kind for module, names in modules.items() for name, kind in names.items()}
    for place, kind in shown.items():
        if not dataclasses.is_dataclass(kind):
            continue
        plain, hints = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
        for name, hint in hints.items():
            bounds = [bound.words for bound in getattr(hint, "__metadata__", ()) if isinstance(bound, Bound)]
            if bounds:
                BOUNDS[f"{place}.{name}"] = ", ".join(bounds)
        if plain != hints:
            kind.__annotations__ = kind.__init__.__annotations__ = plain


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
    """Docstrings as they are written here: `code` as in Markdown, |x| a number, no type before a colon.

    napoleon takes the words before a colon for a type, in a return and in the first line of an attribute; an empty type
    before them leaves the text whole.
    """
    text = CODE_OR_BAR.sub(lambda found: f"``{found[1]}``" if found[1] else "\\|", "\n".join(lines))
    if what in ("attribute", "data", "property"):
        bounds = f" It must be {BOUNDS[name]}." if name in BOUNDS else ""
        text = f": {text.rstrip()}{bounds}\n"
    lines[:] = RETURNS.sub(r"\1: ", text).split("\n")


def signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Makes a default that is no Python (`<factory>`) one that is: otherwise Sphinx cuts the signature at commas."""
    return arguments and OBJECT.sub("...", arguments), returns


def formula(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Writes a formula as MathML, which browsers draw by themselves: the site asks no other site for a script."""
    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block)
    writer.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Registers them; docstrings come here before napoleon reads their sections."""
    plain_types()
    app.connect("autodoc-process-docstring", docstring, priority=400)
    app.connect("autodoc-process-signature", signature)
    app.connect("source-read", contents)
    app.connect("source-read", outside)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
