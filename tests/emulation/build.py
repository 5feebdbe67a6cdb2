"""Compiles the emulated kernels, once for every state of their sources.

CBAM_EMULATION_CACHE     where objects and libraries are kept (default: build/emulation)
CBAM_EMULATION_SANITIZE  1: load() takes the build with AddressSanitizer and UBSan; the process must
                         have been started with sanitizer_environment()
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from cbam_ext.building import decisions

from support import compilation
from support.compilation import CSRC, Library
from support.packages import CHECKOUT

HERE = Path(__file__).resolve().parent

# The GPU's compiler lets kernels see one buffer as several types, so must this one.
_FLAGS = ("-Wno-unknown-pragmas", "-Wno-uninitialized", "-fno-strict-aliasing")
_FAST = ("-O2", "-g0")
_SANITIZED = (
    "-O0",  # compiling takes a multiple of the time otherwise, and more than it saves
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",  # wants the run-time types of classes that torch keeps to itself
    "-fno-sanitize-recover=all",
)

_RUNTIME = tuple(sorted((HERE / "runtime").glob("*.cpp")))
_FOLDERS = (HERE / "include", HERE / "runtime")


def build(sanitize: bool = False) -> Path:
    """The library of the emulated operators, compiled if its sources have changed."""
    names = ("forward.cu", "backward.cu", "apply_backward.cu", "plan.cpp")
    kernels = [CSRC / "cuda" / name for name in names]
    arguments = [CSRC / "torch" / name for name in ("checks.cpp", "tensors.cpp")]
    torch_folder = Path(torch.__file__).resolve().parent
    library = Library(
        "operators",
        (*kernels, *arguments, HERE / "library.cpp", *_RUNTIME),
        compilation.headers_in(*_FOLDERS, CSRC),
        # The one folder: enough for the stable ABI. As system headers they give no warnings.
        (*_flags(sanitize), "-isystem", str(torch_folder / "include")),
        (*_linked(sanitize), *_torch_libraries(torch_folder / "lib")),
        (torch.__version__,),
    )
    return compilation.build(library, _cache_folder())


def build_toys(sanitize: bool = False) -> Path:
    """The library of the toy kernels, which need no torch."""
    library = Library(
        "toys",
        (HERE / "toys.cu", *_RUNTIME),
        compilation.headers_in(*_FOLDERS),
        _flags(sanitize),
        _linked(sanitize),
    )
    return compilation.build(library, _cache_folder())


def load() -> None:
    """Makes ``torch.ops.cbam_emulated`` exist, without its Python half."""
    if not torch._C._jit_get_schemas_for_operator("cbam_emulated::forward"):
        torch.ops.load_library(str(loaded_path()))


@functools.cache
def loaded_path() -> Path:
    """The library that load() takes in this process."""
    return build(sanitize=os.environ.get("CBAM_EMULATION_SANITIZE") == "1")


def sanitizer_environment() -> dict[str, str]:
    """The environment for a process that loads a build with sanitizers."""
    libraries = ["libasan.so", "libstdc++.so.6"]
    if _by_clang():
        libraries[0] = f"libclang_rt.asan-{os.uname().machine}.so"
    # The interpreter is not linked with libstdc++, and libasan wants to find its functions for
    # exceptions at once.
    command = compilation.compiler()
    found = [decisions.first_line([*command, f"-print-file-name={name}"]) for name in libraries]
    return {
        **os.environ,
        "CBAM_EMULATION_SANITIZE": "1",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _flags(sanitize: bool) -> tuple[str, ...]:
    flags = (*_FLAGS, *(_SANITIZED if sanitize else _FAST), f"-I{HERE / 'include'}")
    return compilation.product_flags(*flags, without=("-O", "-g"))


def _linked(sanitize: bool) -> tuple[str, ...]:
    return ("-ldl", "-shared-libasan") if sanitize and _by_clang() else ("-ldl",)


def _torch_libraries(folder: Path) -> tuple[str, ...]:
    return (f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_cpu", "-lc10")


def _by_clang() -> bool:
    return "clang" in compilation.compiler_version()


def _cache_folder() -> Path:
    chosen = os.environ.get("CBAM_EMULATION_CACHE")
    return Path(chosen) if chosen else CHECKOUT / "build" / "emulation"
