"""The rooms of the package: who may know whom, by which door, and how much is in one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.packages import CHECKOUT

PACKAGE = CHECKOUT / "cbam_ext"
# Of each room (a folder, or a file at the top) the rooms that it imports. All of them stand above
# its own line: so there is no circle. An arrow that is new is a decision, to be written down here.
ARROWS = {
    "_version": "",
    "_inputs": "",
    "_progress": "",
    "_text": "",
    "building": "_version",
    "reference": "_text",
    "ops": "building reference",
    "functional": "building ops reference",
    "plan": "_text building reference",
    "layers": "functional reference",
    "export": "building reference",
    "loading": "building ops",
    "module": "building functional layers reference",
    "placement": "_inputs layers module reference",
    "conversion": "_inputs _progress layers module placement",
    "cost": "_inputs _progress _text",
    "visualization": "_inputs _text module",
    "smp": "layers module placement",
    "cli": "_progress _text _version building conversion cost ops plan reference smp",
    "__init__": "_version conversion cost export functional loading module ops placement "
    "reference visualization",
    "__main__": "cli",
}
# Its files are its doors: setup.py is there before torch is, and its __init__ imports nothing.
WITHOUT_DOOR = ("building",)
MOST_FILES_AT_THE_TOP = 10
MOST_LINES = 500


@dataclass(frozen=True)
class Import:
    """That ``file`` (its parts, without .py) imports ``target``, from there these names."""

    file: tuple[str, ...]
    target: tuple[str, ...]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'/'.join(self.file)} imports {'.'.join(self.target)}: {', '.join(self.names)}"


def imports_of(package: Path) -> Iterator[Import]:
    """Those from the package itself, also within functions and for type checkers alone."""
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                yield from _resolved(package, file, node)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    first, *rest = alias.name.split(".")
                    if first == package.name:
                        yield Import(file, tuple(rest) or ("__init__",), ())


def _resolved(package: Path, file: tuple[str, ...], node: ast.ImportFrom) -> Iterator[Import]:
    names = tuple(alias.name for alias in node.names)
    module = tuple(node.module.split(".")) if node.module else ()
    if node.level:
        module = (*file[: len(file) - node.level], *module)
    elif module[:1] == (package.name,):
        module = module[1:]
    else:
        return
    inside = [n for n in names if _is_module(package.joinpath(*module, n))]
    for name in inside:  # from . import reference
        yield Import(file, (*module, name), ())
    others = tuple(n for n in names if n not in inside)
    if others:
        yield Import(file, module or ("__init__",), others)


def _is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def wrong_arrows(package: Path, arrows: dict[str, str]) -> list[str]:
    """Arrows that are not in the table, that are in it without being there, or that lead up."""
    order = list(arrows)
    found: dict[str, set[str]] = {room: set() for room in order}
    wrong = []
    for each in imports_of(package):
        room, target = each.file[0], each.target[0]
        if room == target:
            continue
        found.setdefault(room, set()).add(target)
        if room not in order or target not in arrows[room].split():
            wrong.append(f"not in the table: {each}")
    for room, targets in arrows.items():
        unused = set(targets.split()) - found[room]
        wrong += [f"in the table only: {room} imports {target}" for target in sorted(unused)]
        late = [t for t in targets.split() if t not in order[: order.index(room)]]
        wrong += [f"leads up: {room} imports {target}" for target in late]
    return wrong


def back_doors(package: Path) -> list[str]:
    """Imports of a file in another room, past its ``__init__``, or of names that it keeps."""
    wrong = []
    for each in imports_of(package):
        room = each.target[0]
        if room in (each.file[0], *WITHOUT_DOOR) or not (package / room).is_dir():
            continue
        door = _names_bound_in(package / room / "__init__.py")
        if len(each.target) > 2 or (len(each.target) == 2 and each.target[1] not in door):
            wrong.append(f"past the door: {each}")
        elif len(each.target) == 1 and not door.issuperset(each.names):
            wrong.append(f"not offered: {each}")
        elif len(each.target) == 2 and each.names:
            wrong.append(f"past the door: {each}")
    return wrong


def _names_bound_in(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def circles(package: Path) -> list[str]:
    """Files that import each other, directly or not, within a room."""
    known: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for each in imports_of(package):
        if each.file[-1] != "__init__" and each.target != each.file:
            known.setdefault(each.file, set()).add(each.target)

    def reached(start: tuple[str, ...]) -> set[tuple[str, ...]]:
        seen: set[tuple[str, ...]] = set()
        waiting = [start]
        while waiting:
            new = known.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    return ["/".join(file) for file in known if file in reached(file)]


def too_full(package: Path) -> list[str]:
    top = sorted(package.glob("*.py"))
    wrong = [f"{len(top)} files at the top"] if len(top) > MOST_FILES_AT_THE_TOP else []
    for path in sorted(package.rglob("*.py")):
        lines = len(path.read_text().splitlines())
        if lines > MOST_LINES:
            wrong.append(f"{path.relative_to(package)} has {lines} lines")
    return wrong


def test_arrows() -> None:
    assert wrong_arrows(PACKAGE, ARROWS) == []


def test_one_door() -> None:
    assert back_doors(PACKAGE) == []


def test_no_circles() -> None:
    assert circles(PACKAGE) == []


def test_sizes() -> None:
    assert too_full(PACKAGE) == []


# ------------------------------------------------------------------- whether these tests can fail


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Two floors with an arrow from the upper to the lower, by its door."""
    for path, text in {
        "__init__.py": "",
        "cellar/__init__.py": "from .stairs import climb\n",
        "cellar/stairs.py": "def climb(): ...\n",
        "cellar/wine.py": "",
        "roof.py": "from .cellar import climb\n",
    }.items():
        file = tmp_path / "house" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "house"


PLAN = {"__init__": "", "cellar": "", "roof": "cellar"}


def test_a_sound_house_has_no_faults(house: Path) -> None:
    assert wrong_arrows(house, PLAN) + back_doors(house) + circles(house) + too_full(house) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cellar/wine.py", "from .. import roof"),
        ("cellar/wine.py", "from ..roof import climb"),
        ("cellar/wine.py", "def late():\n    from house.roof import climb"),
        (
            "cellar/wine.py",
            "if TYPE_CHECKING:\n    import house.roof",
        ),
        ("roof.py", ""),
        ("attic.py", "from . import roof"),
    ],
)
def test_wrong_arrows_are_found(house: Path, file: str, text: str) -> None:
    (house / file).write_text(text + "\n")
    assert wrong_arrows(house, PLAN) != []


@pytest.mark.parametrize(
    "text",
    ["from .cellar.stairs import climb", "from .cellar import wine", "from .cellar import jump"],
)
def test_back_doors_are_found(house: Path, text: str) -> None:
    (house / "roof.py").write_text(text + "\n")
    assert back_doors(house) != []


def test_circles_are_found(house: Path) -> None:
    (house / "cellar" / "wine.py").write_text("from .stairs import climb\n")
    (house / "cellar" / "stairs.py").write_text("def climb():\n    from . import wine\n")
    assert circles(house) == ["cellar/stairs", "cellar/wine"]


def test_full_rooms_are_found(house: Path) -> None:
    (house / "roof.py").write_text("\n" * (MOST_LINES + 1))
    for number in range(MOST_FILES_AT_THE_TOP):
        (house / f"room{number}.py").touch()
    assert len(too_full(house)) == 2
