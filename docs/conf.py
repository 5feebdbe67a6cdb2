"""How Sphinx makes pages of this folder: ``make docs``.

The pages are Markdown that GitHub shows too: they link to each other, to sources and to tests by
relative paths. The reference (api.md) is made from the docstrings of the installed package.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cbam_ext

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "cbam_ext"
author = "The cbam_ext authors"
copyright = author
version = release = cbam_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nitpicky = True
# Names of PyTorch, Python and matplotlib, whose lists would have to be fetched, and an error that
# stands in no public module.
nitpick_ignore_regex = [("py:.*", r"(torch|nn|matplotlib)\..*|Tensor|Figure|BuildError")]

myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]
autodoc_typehints = "none"  # the texts tell more than the annotations
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"cbam_ext {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "github-dark"

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# Pages whose text stands in a document elsewhere in the repository.
TEXTS = {
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "sources": ROOT / "csrc/README.md",
    "sources-cuda": ROOT / "csrc/cuda/README.md",
    "measurements": ROOT / "bench/README.md",
    "measurements-cpu": ROOT / "bench/results/cpu.md",
    "measurements-norm": ROOT / "bench/results/cpu_norm.md",
    "measurements-simulated": ROOT / "bench/results/simulated.md",
    "measurements-machine-code": ROOT / "bench/results/machine_code.md",
    "measurements-gate-starts": ROOT / "bench/results/gate_starts.md",
}
PAGES = {document: page for page, document in TEXTS.items()}
# [text](target#anchor) and [text]: target, where the target is a path.
LINK = re.compile(r"(?<!!)\[([^][]*)\](\(|: )(?!https?:|#)([^\s()#]+)((?:#[^\s()]*)?\)?)")
IMAGE = re.compile(r"(!\[[^][]*\]\()(?!https?:)([^\s()]+)")


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts the texts from elsewhere where they have a page, and makes their links lead there."""
    document = TEXTS.get(page, DOCS / f"{page}.md")
    if page in TEXTS:
        app.env.note_dependency(document, docname=page)
        source[0] = document.read_text(encoding="utf-8")

    def relink(link: re.Match[str]) -> str:
        text, opening, path, rest = link.groups()
        target = (document.parent / path).resolve()
        if target.is_dir():
            return text  # GitHub shows folders, a built page has none
        if target in PAGES:
            return f"[{text}]{opening}{PAGES[target]}.md{rest}"
        return f"[{text}]{opening}{os.path.relpath(target, DOCS)}{rest}"

    def move_image(image: re.Match[str]) -> str:
        opening, path = image.groups()
        return opening + os.path.relpath(document.parent / path, DOCS)

    source[0] = IMAGE.sub(move_image, LINK.sub(relink, source[0]))


def find_short_name(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Docstrings call each other by the names that they have where they stand."""
    if node["refdomain"] != "py" or node.get("refspecific"):
        return None
    node["refspecific"] = True  # any name that ends so
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, content
    )


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
    app.connect("missing-reference", find_short_name)
