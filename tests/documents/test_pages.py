"""README, docs/ and the documents that they link to: links lead somewhere, code says what it is."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "README.md").is_file())
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")),
    *(ROOT / "csrc" / name for name in ("README.md", "cuda/README.md")),
    *sorted((ROOT / "bench" / "results").glob("*.md")),
    *PAGES,
]
BY_NAME = {str(document.relative_to(ROOT)): document for document in DOCUMENTS}

FENCE = re.compile(r"^```(\S*).*?^```$", re.DOTALL | re.MULTILINE)
# What a fence may hold: Python, which test_documentation.py runs, what is not run, and what Sphinx
# makes something of. Python by another name would be shown and never run.
LANGUAGES = {"python", "sh", "text", "cmake", "cpp", "{toctree}", "{eval-rst}"}


@cache
def prose(document: Path) -> str:
    """The text without its code."""
    return re.sub(r"`[^`\n]+`", "`code`", FENCE.sub("", document.read_text()))


@cache
def anchors(document: Path) -> set[str]:
    """The anchors of all headings, as GitHub makes them."""
    found: set[str] = set()
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    for heading in headings:
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        repeats = sum(
            re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found
        )
        found.add(f"{slug}-{repeats}" if repeats else slug)
    return found


def links(document: Path) -> list[str]:
    """Targets of links and pictures in the document, those of other sites excepted."""
    text = prose(document)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"^\[[^]]+\]: +(\S+)$", text, re.MULTILINE)
    targets += re.findall(r'<img src="([^"]+)"', text)
    return [target for target in targets if not re.match(r"https?:", target)]


@pytest.mark.parametrize("name", BY_NAME)
def test_links(name: str) -> None:
    """Each relative link leads to a file that is there, and to a heading where it names one."""
    document = BY_NAME[name]
    dead = []
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("name", BY_NAME)
def test_named_links(name: str) -> None:
    """Links by name, as [test_values.py], have a target at the end of the document, used once."""
    text = prose(BY_NAME[name])
    defined = re.findall(r"^\[([^]]+)\]: ", text, re.MULTILINE)
    used = set(re.findall(r"\]\[([^]]+)\]", text))
    used |= set(re.findall(r"(?<!\])\[([\w.]+\.\w+)\](?![(\[:])", text))
    assert sorted(defined) == sorted(used)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_is_reached(page: Path) -> None:
    """It stands in the table of contents."""
    if page.name == "index.md":
        return
    contents = (ROOT / "docs" / "index.md").read_text().split("```{toctree}")[1:]
    assert any(re.search(rf"^(.*<)?{page.stem}>?$", part, re.MULTILINE) for part in contents)


@pytest.mark.parametrize("name", BY_NAME)
def test_languages(name: str) -> None:
    """Every block of code says what it is."""
    assert set(FENCE.findall(BY_NAME[name].read_text())) <= LANGUAGES


DRAWINGS = {drawing.name: drawing for drawing in sorted((ROOT / "docs").glob("*.svg"))}


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings(name: str) -> None:
    """Each says what it shows to those who do not see it, and follows light and dark mode."""
    svg = ElementTree.parse(DRAWINGS[name]).getroot()
    space = "{http://www.w3.org/2000/svg}"
    title, description = svg.find(f"{space}title"), svg.find(f"{space}desc")
    assert title is not None and title.text
    assert description is not None and description.text
    assert svg.get("role") == "img"
    assert svg.get("aria-labelledby", "").split() == [title.get("id"), description.get("id")]
    assert "prefers-color-scheme: dark" in DRAWINGS[name].read_text()
