"""What runs on several threads cannot throw: an exception that leaves a body of a parallel loop
ends the process, or is lost. So these bodies allocate nothing and check nothing, and neither does
what they call; memory is taken before (arena.h), arguments are checked before any work.

Read from the sources: where something throws that no test can make throw, only reading shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from support.compilation import CSRC

LOOPS = re.compile(r"\b(?:for_each_unit|each_sample|each_tile\w*|parallel_\w+)\s*(?:<[^;(]*>)?\(")
# Throwing itself, allocating, and checking.
THROWS = re.compile(
    r"\bthrow\b|\bnew\b|\bstd::(?:vector|string|map|function|unique_ptr|make_unique|make_shared|to_string|stoi)\b"
    r"|\.(?:at|resize|reserve|push_back|emplace_back|insert|value)\(|\w*_CHECK\b|\bPrepared<"
    r"|\bdynamic_cast\b|\bstd::get<"
)
# What takes memory, and runs on the calling thread, outside of all loops.
OUTSIDE = {
    "arena.h": r"class Prepared .*",
    "backward.h": r"Prepared<|std::vector<double> conv_grads",
    "forward.h": r"Prepared<",
    "parameter_grads.h": r"write_conv_grads|std::vector<A> sums|Prepared<",
    "sample.h": r"Prepared<",
}
ALLOCATING = re.compile(r"\b(?:write_conv_grads|write_mlp_grads)\b")

FILES = sorted(path for path in (CSRC / "cpu").iterdir() if path.suffix in {".h", ".inl"})


def code(text: str) -> str:
    """Without comments; lines keep their numbers."""
    return re.sub(r"//.*", "", text)


def bodies(text: str) -> Iterator[tuple[int, str]]:
    """The arguments of each parallel loop, with the line that it begins in."""
    for match in LOOPS.finditer(text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield text.count("\n", 0, match.start()) + 1, text[match.end() : end - 1]


def faults(name: str, text: str) -> list[str]:
    text = code(text)
    found = [
        f"{name}:{line}: {words[0]} in the body of a parallel loop"
        for line, body in bodies(text)
        if "{" in body
        for words in [*THROWS.finditer(body), *ALLOCATING.finditer(body)]
    ]
    if name == "arena.h":  # the place that takes memory for all others
        return found
    allowed = re.compile(OUTSIDE.get(name, r"(?!)"))
    return found + [
        f"{name}:{number}: {words[0]}"
        for number, line in enumerate(text.splitlines(), 1)
        if (words := THROWS.search(line)) and not allowed.search(line)
        if not line.startswith("#include")
    ]


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_nothing_throws(name: str) -> None:
    assert faults(name, (CSRC / "cpu" / name).read_text()) == []


def test_loops_are_seen() -> None:
    seen = {path.name: len(list(bodies(code(path.read_text())))) for path in FILES}
    assert seen["forward.h"] >= 4 and seen["backward.h"] >= 4 and seen["sample.h"] >= 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("std::vector<A> sums(4);", "std::vector"),
        ("if (x.empty()) { throw 1; }", "throw"),
        ("const Prepared<Weights<A>> weights(1, shape);", "Prepared<"),
        ("write_conv_grads(shape);", "write_conv_grads"),
        ("STD_TORCH_CHECK(f(i), (1));", "STD_TORCH_CHECK"),
    ],
)
def test_what_throws_is_found(body: str, words: str) -> None:
    text = f"void f() {{\n  g();\n  for_each_unit(true, n(), [&](int64_t i) {{ {body} }});\n}}\n"
    assert f"forward.h:3: {words} in the body of a parallel loop" in faults("forward.h", text)
    assert faults("forward.h", text.replace(body, "h(i);")) == []
