"""Settings of Sphinx. Build the site with: python -m sphinx -W --keep-going -b html -c docs . build/docs

Pages are plain Markdown, so that they can be read on a code host too. Three things are made while the site is built:
the navigation, from the lists of links in index.md; the docstrings of the names in api.md; the pages of reference.py.
"""

import importlib.metadata
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sphinx.util import logging

sys.path.append(str(Path(__file__).parent))

project = "lightning_dlrm"
release = version = importlib.metadata.version("lightning-dlrm")
root_doc = "docs/index"
include_patterns = ["docs/*.md", "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "tests", "lightning_dlrm", "datamodules", "notebooks", "configs"]
nitpicky = True
nitpick_ignore_regex = [
    # Types of other projects, and classes that are not public, have no page here.
    (r"py:\w+", r"(torch|collections|pathlib|typing|pytorch_lightning|numpy|pd|pa)\..*"),
    (r"py:class", r"(lightning_dlrm|datamodules)\.\w+\..*"),
    (r"py:class", r"ClickCurves"),
]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "member-order": "bysource"}
# Methods of Lightning and torch are documented there.
autodoc_inherit_docstrings = False

# Typographic quotes would turn the two hyphens of an option into a dash.
smartquotes = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("tables.js", {"defer": "defer"})]
html_title = "lightning_dlrm"
html_copy_source = False
html_show_copyright = False


def add_navigation(text: str) -> str:
    """Return index.md with a hidden table of contents of each of its sections."""
    trees = ""
    for title, section in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        pages = "\n".join(re.findall(r"^\| \[[^\]]+\]\((\w[\w-]*)\.md\)", section, re.MULTILINE))
        trees += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{pages}\n```\n"
    others = "README </README>\n" + "\n".join(f"/{name}" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"))
    return f"{text}{trees}\n```{{toctree}}\n:hidden:\n:caption: Project\n\n{others}\n```\n"


def add_docstrings(text: str) -> str:
    """Return api.md with the docstring of every name of a table below the table."""

    def document(table: re.Match[str]) -> str:
        directives = []
        for name in re.findall(r"^\| `([\w.]+)`", table[0], re.MULTILINE):
            path = name if "." in name else f"lightning_dlrm.{name}"
            module, _, attribute = path.rpartition(".")
            is_class = isinstance(getattr(importlib.import_module(module), attribute), type)
            directives.append(f".. auto{'class' if is_class else 'function'}:: {path}")
        listed = "\n\n".join(directives)
        return f"{table[0]}\n```{{eval-rst}}\n{listed}\n```\n"

    return re.sub(r"(?:^\|.*\n)+", document, text, flags=re.MULTILINE)


@cache
def reference() -> dict[str, str]:
    """Return the pages that are made from the code."""
    pages: dict[str, str] = importlib.import_module("reference").pages()
    return pages


def as_made(name: str, text: str) -> str:
    """Return a page of ``reference``; warn, which ends a strict build, if the text of the file differs."""
    made = reference()[name]
    if text != made:
        logging.getLogger(__name__).warning("docs/%s is not as the code is: run python docs/reference.py", name)
    return made


def plain_image(text: str) -> str:
    """Return text with the image of each HTML picture, which site.css replaces by its narrow form on a phone."""
    return re.sub(r'<picture>.*?<img src="(.*?)" alt="(.*?)">.*?</picture>', r"![\2](\1)", text, flags=re.DOTALL)


def complete_page(app: Any, page: str, source: list[str]) -> None:
    """Change a page as the site has it."""
    change = {
        "README": plain_image,
        "docs/index": lambda text: add_navigation(plain_image(text)),
        "docs/api": add_docstrings,
        "docs/commands": lambda text: as_made("commands.md", text),
        "docs/configuration": lambda text: as_made("configuration.md", text),
    }.get(page)
    if change is not None:
        source[0] = change(source[0])


_attributes: dict[str, list[str]] = {}


def keep_attribute(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Keep the docstring of an attribute: Napoleon takes the words before its first colon as a type."""
    if what in ("attribute", "property"):
        _attributes[name] = lines.copy()


def restore_attribute(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _attributes.pop(name, lines)


def lead_to_index(app: Any, error: Exception | None) -> None:
    """Let the site's address lead to docs/index.html."""
    Path(app.outdir, "index.html").write_text(
        '<!doctype html><html lang="en"><title>lightning_dlrm</title>'
        '<meta http-equiv="refresh" content="0; url=docs/index.html">'
        '<a href="docs/index.html">Documentation</a></html>\n'
    )


def setup(app: Any) -> None:
    app.connect("source-read", complete_page)
    app.connect("autodoc-process-docstring", keep_attribute, priority=400)
    app.connect("autodoc-process-docstring", restore_attribute, priority=600)
    app.connect("build-finished", lead_to_index)
