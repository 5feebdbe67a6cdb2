"""Compiles the emulated kernels, once for every state of their sources.

CBAM_EMULATION_CACHE     where objects and libraries are kept (default: build/emulation)
CBAM_EMULATION_SANITIZE  1: load() takes the build with AddressSanitizer and UBSan; the process must
                         have been started with sanitizer_environment()
"""

from __future__ import annotations

import enum
import functools
import os
from pathlib import Path

import torch

from support import compilation
from support.compilation import CSRC, Library
from support.packages import CHECKOUT

HERE = Path(__file__).resolve().parent


class Build(enum.Enum):
    """What a library is for."""

    FAST = "fast"
    SANITIZED = "sanitized"  # AddressSanitizer and UBSan
    INSTRUMENTED = "instrumented"  # tells the detector of races of every access to shared memory
    COUNTED = "counted"  # counts rounds of loads, in float64


# Of the operators. The last two are loaded beside those of the fast build.
NAMESPACES = {
    Build.FAST: "cbam_emulated",
    Build.SANITIZED: "cbam_emulated",
    Build.INSTRUMENTED: "cbam_instrumented",
    Build.COUNTED: "cbam_counted",
}

# The GPU's compiler lets kernels see one buffer as several types, so must this one.
_COMMON = ("-Wno-unknown-pragmas", "-Wno-uninitialized", "-fno-strict-aliasing")
_FAST = ("-O2", "-g0")
_FLAGS = {
    Build.FAST: _FAST,
    Build.SANITIZED: compilation.SANITIZED,
    Build.INSTRUMENTED: _FAST,
    Build.COUNTED: _FAST,
}
# Of the kernels, not of the runtime, which is what they tell. Linked without them.
_KERNEL_FLAGS = {
    Build.INSTRUMENTED: ("-O1", "-g1", "-fsanitize=thread"),
    # A number with a mark is copied as the number is.
    Build.COUNTED: ("-O1", "-include", "emulation/rounds.h", "-Wno-class-memaccess"),
}

_RUNTIME = tuple(sorted((HERE / "runtime").glob("*.cpp")))
_OPERATORS = {Build.INSTRUMENTED: "instrumented_library.cpp", Build.COUNTED: "counted_library.cpp"}
_TOYS = {Build.COUNTED: (HERE / "counting_toys.cu",)}
_FOLDERS = (HERE / "include", HERE / "runtime")


@functools.cache
def build(kind: Build = Build.FAST) -> Path:
    """The library of the emulated operators, compiled if its sources have changed."""
    names = ("forward.cu", "backward.cu", "apply_backward.cu", "plan.cpp")
    kernels = [CSRC / "cuda" / name for name in names]
    arguments = [CSRC / "torch" / name for name in ("checks.cpp", "tensors.cpp")]
    torch_folder = Path(torch.__file__).resolve().parent
    operators = HERE / _OPERATORS.get(kind, "library.cpp")
    library = Library(
        "operators",
        (*kernels, *arguments, operators, HERE / "shim.cpp", *_RUNTIME),
        (*compilation.headers_in(*_FOLDERS, CSRC), HERE / "library.cpp"),
        # The one folder: enough for the stable ABI. As system headers they give no warnings.
        (*_flags(kind), "-DUSE_CUDA", "-isystem", str(torch_folder / "include")),
        # What shim.cpp stands in for is called there, and not in torch.
        (*_linked(kind), "-Wl,-Bsymbolic-functions", *_torch_libraries(torch_folder / "lib")),
        (torch.__version__,),
        _KERNEL_FLAGS.get(kind, ()),
    )
    return compilation.build(library, _cache_folder())


@functools.cache
def build_toys(kind: Build = Build.FAST) -> Path:
    """The library of the toy kernels, which need no torch."""
    library = Library(
        "toys",
        (*_TOYS.get(kind, (HERE / "toys.cu", HERE / "racing_toys.cu")), *_RUNTIME),
        (*compilation.headers_in(*_FOLDERS), HERE / "toys.cuh"),
        _flags(kind),
        _linked(kind),
        kernel_flags=_KERNEL_FLAGS.get(kind, ()),
    )
    return compilation.build(library, _cache_folder())


def load(kind: Build | None = None) -> None:
    """Makes ``torch.ops.cbam_emulated`` exist, without its Python half.

    Or what NAMESPACES has for the kind; without one, that of this process.
    """
    kind = kind or _kind_of_process()
    if not torch._C._jit_get_schemas_for_operator(f"{NAMESPACES[kind]}::forward"):
        torch.ops.load_library(str(build(kind)))


def loaded_path() -> Path:
    """The library that load() takes in this process."""
    return build(_kind_of_process())


def _kind_of_process() -> Build:
    sanitized = os.environ.get("CBAM_EMULATION_SANITIZE") == "1"
    return Build.SANITIZED if sanitized else Build.FAST


def sanitizer_environment() -> dict[str, str]:
    """The environment for a process that loads a build with sanitizers."""
    return compilation.sanitizer_environment() | {"CBAM_EMULATION_SANITIZE": "1"}


def _flags(kind: Build) -> tuple[str, ...]:
    flags = (*_COMMON, *_FLAGS[kind], f"-I{HERE / 'include'}")
    return compilation.product_flags(*flags, without=("-O", "-g"))


def _linked(kind: Build) -> tuple[str, ...]:
    more = compilation.sanitizer_link_flags() if kind is Build.SANITIZED else ()
    return ("-ldl", *more)


def _torch_libraries(folder: Path) -> tuple[str, ...]:
    return (f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10")


def _cache_folder() -> Path:
    chosen = os.environ.get("CBAM_EMULATION_CACHE")
    return Path(chosen) if chosen else CHECKOUT / "build" / "emulation"
