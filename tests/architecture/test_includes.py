"""The folders of csrc/ state its layers, and the arrows between them point one way.

    torch/    knows torch, cpu/ and cuda/
    cpu/      knows neither torch nor cuda/
    cuda/     knows neither torch nor cpu/
    library/  what a shared library needs as a file: knows none of the others

What all share stands at the top and knows nothing of them. Every rule is a function from a source
folder to what is wrong in it, and is tried on a small tree in which it is broken.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# What the files of a folder may include; "" is the top.
MAY_INCLUDE = {
    "": {""},
    "cpu": {"", "cpu"},
    "cuda": {"", "cuda"},
    "torch": {"", "cpu", "cuda", "torch"},
    "library": {"library"},
}
DOOR = "torch/abi.h"

COMPILED = {".cpp", ".cu"}
SOURCES = {*COMPILED, ".h", ".cuh", ".inl"}
MOST_LINES = 500

# Names of torch, in code without comments. Behind the door are those that its typed API hides.
TORCH_NAME = re.compile(r"\b(?:torch::|at::|c10::|\w*TORCH_\w+|aoti_\w+)")
BEHIND_DOOR = re.compile(r"\bdetail::|\baoti_\w+|\btorch_call_\w+|\bAten\w+|\bshim\b")
TORCH_HEADER = re.compile(r"(?:torch|ATen|c10|caffe2)/")
CUDA_HEADER = re.compile(r"cu(?:da|blas|dnn)\w*[./]")


@dataclass(frozen=True)
class Include:
    file: str  # in the source folder
    line: int
    target: str
    quoted: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} includes {self.target}"


def files(folder: Path) -> list[str]:
    found = [path for path in folder.rglob("*") if path.suffix in SOURCES]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def layer(file: str) -> str:
    return file.rpartition("/")[0]


@functools.cache
def code(path: Path) -> str:
    """The text without comments; lines keep their numbers."""
    text = re.sub(
        r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), path.read_text(), flags=re.S
    )
    return re.sub(r"//.*", "", text)


def names(path: Path) -> str:
    """The text without comments and literals."""
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', code(path))


def includes(folder: Path) -> Iterator[Include]:
    pattern = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
    for file in files(folder):
        text = code(folder / file)
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start(2)) + 1
            yield Include(file, line, match[2], match[1] == '"')


def resolved(folder: Path, include: Include) -> str | None:
    """The file of the source folder that a quoted include means; None if there is none."""
    path = ((folder / include.file).parent / include.target).resolve()
    if path.is_file() and path.is_relative_to(folder.resolve()):
        return path.relative_to(folder.resolve()).as_posix()
    return None


def neighbours(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {file: set() for file in files(folder)}
    for include in includes(folder):
        target = resolved(folder, include) if include.quoted else None
        if target is not None:
            found[include.file].add(target)
    return found


def reached(folder: Path, starts: set[str]) -> set[str]:
    """The files that these include, and they themselves."""
    graph, seen, waiting = neighbours(folder), set(), list(starts)
    while waiting:
        file = waiting.pop()
        if file in graph and file not in seen:
            seen.add(file)
            waiting.extend(graph[file])
    return seen


def listed(folder: Path) -> dict[str, list[str]]:
    """The files of each library in sources.txt."""
    libraries: dict[str, list[str]] = {}
    for line in (folder / "sources.txt").read_text().splitlines():
        words = line.partition("#")[0].split()
        if words:
            libraries.setdefault(words[0], []).append(words[1])
    return libraries


# ----------------------------------------------------------------------------------------- rules


def unknown_folders(folder: Path) -> list[str]:
    """Every file is in a layer."""
    return [f"{file} is in no layer" for file in files(folder) if layer(file) not in MAY_INCLUDE]


def turned_arrows(folder: Path) -> list[str]:
    """Quoted includes lead to files of layers that the layer may know."""
    found = []
    for include in includes(folder):
        if not include.quoted:
            continue
        target = resolved(folder, include)
        if target is None:
            found.append(f"{include}, which is not there")
        elif layer(target) not in MAY_INCLUDE.get(layer(include.file), set()):
            found.append(str(include))
    return found


def torch_outside(folder: Path) -> list[str]:
    """Only torch/ knows torch, by headers or by names."""
    found = [
        str(include)
        for include in includes(folder)
        if layer(include.file) != "torch" and TORCH_HEADER.match(include.target)
    ]
    for file in files(folder):
        for match in TORCH_NAME.finditer(names(folder / file)):
            if layer(file) != "torch":
                found.append(f"{file} names {match[0]}")
    return found


def other_doors(folder: Path) -> list[str]:
    """Only the door includes torch's headers and names what its typed API hides."""
    found = [
        str(include)
        for include in includes(folder)
        if include.file != DOOR and TORCH_HEADER.match(include.target)
    ]
    for file in files(folder):
        for match in BEHIND_DOOR.finditer(names(folder / file)):
            if file != DOOR:
                found.append(f"{file} names {match[0]}")
    return found


def late_doors(folder: Path) -> list[str]:
    """The door decides what torch's headers show: it is the first include of torch/'s headers."""
    first: dict[str, Include] = {}
    for include in includes(folder):
        first.setdefault(include.file, include)
    headers = [file for file in files(folder) if layer(file) == "torch" and file.endswith(".h")]
    return [
        f"{file} does not begin with the door"
        for file in headers
        if file != DOOR and (file not in first or first[file].target != "abi.h")
    ]


def cuda_on_cpu(folder: Path) -> list[str]:
    """The CPU library is compiled where there is no CUDA toolkit."""
    files_of_cpu = reached(folder, set(listed(folder).get("cpu", [])))
    return [
        f"{include}, and the CPU library needs it"
        for include in includes(folder)
        if CUDA_HEADER.match(include.target) and include.file in files_of_cpu
    ]


def circles(folder: Path) -> list[str]:
    """No file includes itself, directly or through others."""
    graph = neighbours(folder)
    return [f"{file} includes itself" for file in graph if file in reached(folder, graph[file])]


def unlisted(folder: Path) -> list[str]:
    """sources.txt lists what is compiled: all of it, each file once in a library."""
    found = []
    libraries = listed(folder)
    for library, names in libraries.items():
        found += [
            f"{library}: {name} is not there" for name in names if not (folder / name).is_file()
        ]
        found += [
            f"{library}: {name} twice" for name in sorted(set(names)) if names.count(name) > 1
        ]
    compiled = {name for names in libraries.values() for name in names}
    for file in files(folder):
        if Path(file).suffix in COMPILED and file not in compiled:
            found.append(f"{file} is in no library")
    return found


def unused_headers(folder: Path) -> list[str]:
    """Every header is part of something that is compiled."""
    used = reached(folder, {name for names in listed(folder).values() for name in names})
    return [f"nobody includes {file}" for file in files(folder) if file not in used]


def long_files(folder: Path) -> list[str]:
    counts = {file: len((folder / file).read_text().splitlines()) for file in files(folder)}
    return [f"{file} has {n} lines" for file, n in counts.items() if n > MOST_LINES]


RULES: list[Callable[[Path], list[str]]] = [
    unknown_folders,
    turned_arrows,
    torch_outside,
    other_doors,
    late_doors,
    cuda_on_cpu,
    circles,
    unlisted,
    unused_headers,
    long_files,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(CSRC) == []


def test_what_is_read() -> None:
    """The rules see the files, and the includes by which these hang together."""
    assert {layer(file) for file in files(CSRC)} == set(MAY_INCLUDE)
    seen = {(include.file, include.target) for include in includes(CSRC)}
    assert ("torch/cpu.cpp", "../cpu/kernels.h") in seen
    assert (DOOR, "torch/csrc/stable/library.h") in seen
    assert "problem.h" in reached(CSRC, {"cuda/forward.cu"})


# -------------------------------------------------------------------------------- broken on purpose

GOOD = {
    "sources.txt": "cpu torch/cpu.cpp\ncpu cpu/a.cpp  # x\ncuda cuda/k.cu\ncpu library/l.cpp\n",
    "problem.h": "#include <cstdint>\n// torch:: in words, and detail::\n",
    "cpu/a.h": '#include "../problem.h"\n',
    "cpu/a.cpp": '#include "a.h"\n#include "part.inl"\n',
    "cpu/part.inl": "/* #include <torch/extension.h> */\n",
    "cuda/k.h": '#include <cuda_runtime.h>\n#include "../problem.h"\n',
    "cuda/k.cu": '#include "k.h"\nconst char* kHelp = "TORCH_CUDA_ARCH_LIST";\n',
    "torch/abi.h": "#include <torch/csrc/stable/library.h>\nusing L = torch::stable::detail::L;\n",
    "torch/ops.h": '#include "abi.h"\n\n#include "../problem.h"\n',
    "torch/cpu.cpp": '#include "ops.h"\n#include "../cpu/a.h"\nSTD_TORCH_CHECK(torch::f());\n',
    "library/l.cpp": '#include "l.h"\n',
    "library/l.h": "#include <cstdlib>\n",
}

# Rule, file, what is appended to it (or its new text where it begins with "="), and the complaint.
BROKEN = [
    (unknown_folders, "gpu/x.h", "int x;", "gpu/x.h is in no layer"),
    (turned_arrows, "cpu/a.h", '#include "../torch/ops.h"', "cpu/a.h:2 includes ../torch/ops.h"),
    (
        turned_arrows,
        "cpu/part.inl",
        '#include "../cuda/k.h"',
        "cpu/part.inl:2 includes ../cuda/k.h",
    ),
    (turned_arrows, "cuda/k.cu", '  # include "../cpu/a.h"', "cuda/k.cu:3 includes ../cpu/a.h"),
    (turned_arrows, "problem.h", '#include "cpu/a.h"', "problem.h:3 includes cpu/a.h"),
    (
        turned_arrows,
        "library/l.cpp",
        '#include "../problem.h"',
        "library/l.cpp:2 includes ../problem.h",
    ),
    (
        turned_arrows,
        "cpu/a.h",
        '#include "problem.h"',
        "cpu/a.h:2 includes problem.h, which is not",
    ),
    (
        torch_outside,
        "cpu/a.h",
        "#include <torch/csrc/stable/tensor.h>",
        "cpu/a.h:2 includes torch/",
    ),
    (
        torch_outside,
        "problem.h",
        "#include <c10/util/Half.h>",
        "problem.h:3 includes c10/util/Half.h",
    ),
    (torch_outside, "cuda/k.cu", "void f(const at::Tensor&);", "cuda/k.cu names at::"),
    (torch_outside, "cpu/a.cpp", "STD_TORCH_CHECK(true);", "cpu/a.cpp names STD_TORCH_"),
    (
        other_doors,
        "torch/ops.h",
        "#include <torch/csrc/stable/ops.h>",
        "torch/ops.h:4 includes torch/",
    ),
    (
        other_doors,
        "torch/cpu.cpp",
        "using T = torch::stable::detail::T;",
        "torch/cpu.cpp names detail::",
    ),
    (
        other_doors,
        "torch/cpu.cpp",
        "aoti_torch_get_dim(t);",
        "torch/cpu.cpp names aoti_torch_get_dim",
    ),
    (other_doors, "torch/cpu.cpp", "torch_call_dispatcher(a);", "torch/cpu.cpp names torch_call_"),
    (
        late_doors,
        "torch/ops.h",
        '=#include "../problem.h"\n#include "abi.h"',
        "torch/ops.h does not",
    ),
    (
        cuda_on_cpu,
        "problem.h",
        "#include <cuda_fp16.h>",
        "problem.h:3 includes cuda_fp16.h, and the CPU",
    ),
    (
        cuda_on_cpu,
        "torch/cpu.cpp",
        '#include "../cuda/k.h"',
        "cuda/k.h:1 includes cuda_runtime.h, and",
    ),
    (circles, "problem.h", '#include "problem.h"', "problem.h includes itself"),
    (circles, "problem.h", '#include "cpu/a.h"', "cpu/a.h includes itself"),
    (unlisted, "cuda/forgotten.cu", "int x;", "cuda/forgotten.cu is in no library"),
    (unlisted, "sources.txt", "cpu cpu/gone.cpp", "cpu: cpu/gone.cpp is not there"),
    (unlisted, "sources.txt", "cpu cpu/a.cpp", "cpu: cpu/a.cpp twice"),
    (unused_headers, "cpu/old.h", "int x;", "nobody includes cpu/old.h"),
    (long_files, "cpu/a.cpp", "\n" * MOST_LINES, "cpu/a.cpp has 503 lines"),
]


def plant(folder: Path, changes: dict[str, str]) -> Path:
    for name, text in (GOOD | changes).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_good_tree_passes(tmp_path: Path) -> None:
    plant(tmp_path, {})
    assert [problem for rule in RULES for problem in rule(tmp_path)] == []


@pytest.mark.parametrize(
    ("rule", "file", "text", "complaint"),
    BROKEN,
    ids=[f"{rule.__name__}-{i}" for i, (rule, *_) in enumerate(BROKEN)],
)
def test_a_broken_tree_fails(
    tmp_path: Path, rule: Callable[[Path], list[str]], file: str, text: str, complaint: str
) -> None:
    whole = text[1:] if text.startswith("=") else GOOD.get(file, "") + text + "\n"
    plant(tmp_path, {file: whole})
    assert any(problem.startswith(complaint) for problem in rule(tmp_path)), rule(tmp_path)
