"""What a kernel's name says of it: the kernel, its body, dtype, layout and width."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

# As C++ names them.
_DTYPES = {"double": "float64", "float": "float32", "BFloat16": "bfloat16", "Half": "float16"}
_LAYOUTS = {"(Layout)0": "NCHW", "(Layout)1": "NHWC"}


@dataclass(frozen=True, order=True)
class Name:
    """A kernel's name, taken apart; what it does not say is empty, or 0."""

    kernel: str
    body: str = ""  # what else its template is given, without the dtype
    dtype: str = ""
    layout: str = ""
    width: int = 0  # elements of an access to feature maps

    def __str__(self) -> str:
        body = f"<{self.body}>" if self.body else ""
        words = [f"{self.kernel}{body}", self.dtype, self.layout]
        return " ".join(filter(None, [*words, f"W={self.width}" if self.width else ""]))

    @property
    def is_for_speed(self) -> bool:
        """float64 is there for checks of gradients, and needs twice the registers."""
        return self.dtype != "float64"

    @property
    def is_main(self) -> bool:
        """Whether it walks over feature maps, which have a layout, by wide accesses, for speed."""
        return bool(self.layout) and self.width > 1 and self.is_for_speed


def read_names(mangled: Iterable[str]) -> dict[str, Name]:
    """What these names say; where there is no demangler, they say no more than themselves."""
    names = list(mangled)
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: Name(name) for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return dict(zip(names, map(take_apart, done.stdout.splitlines()), strict=True))


def take_apart(name: str) -> Name:
    """What a demangled name says."""
    name = re.sub(r"\(anonymous namespace\)::|\b(?:cbam|cuda)::", "", name)
    # Some demanglers write the type before a value: (int)3, (bool)1.
    name = re.sub(r"\(bool\)([01])", lambda match: ("false", "true")[int(match.group(1))], name)
    name = re.sub(r"\((?:int|unsigned int|long|unsigned long)\)(?=\d)", "", name)
    kernel, arguments = _split(name.removeprefix("void "))
    dtypes = [word for word in re.findall(r"\w+", ", ".join(arguments)) if word in _DTYPES]
    body, layout, width = [], "", 0
    for i, argument in enumerate(arguments):
        if argument in _LAYOUTS:
            layout = _LAYOUTS[argument]
        elif argument.isdecimal() and i == len(arguments) - 1:
            width = int(argument)
        elif dtypes and (rest := _without(argument, dtypes[0])):
            body.append(rest)
        elif not dtypes:
            body.append(argument)
    dtype = _DTYPES[dtypes[0]] if dtypes else ""
    return Name(kernel.removesuffix("_kernel"), ", ".join(body), dtype, layout, width)


def _split(name: str) -> tuple[str, list[str]]:
    """A function's name and the arguments of its template."""
    kernel, arguments, depth, begin = "", [], 0, 0
    for i, letter in enumerate(name):
        if letter == "(" and depth == 0:  # what it is called with
            return kernel or name[:i], arguments
        if letter == "<":
            depth += 1
            if depth == 1:
                kernel, begin = name[:i], i + 1
        elif depth == 1 and letter in ",>":
            arguments.append(name[begin:i].strip())
            begin = i + 1
        depth -= letter == ">"
    return kernel or name, arguments


def _without(argument: str, dtype: str) -> str:
    """A template's argument without the dtype: GateGrads<Half, true> is GateGrads<true>."""
    argument = re.sub(rf"\b{dtype}\b(?:, )?", "", argument)
    return argument.replace("<>", "").replace(", >", ">").strip()
