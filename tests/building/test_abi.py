"""The built libraries take nothing from libtorch but C functions of its stable ABI that the oldest
supported version has, and give nothing away."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from cbam_ext.building import compile, decisions
from cbam_ext.building import library as libraries

TORCH = Path(torch.__file__).parent
FOLDER = (libraries.status().cpu or libraries.PACKAGE / libraries.CPU_LIBRARY).parent
LIBRARIES = sorted(FOLDER.glob("*.so"))
# The parts of libtorch that C++ code may link with; not its Python bindings.
LINKED = {"libc10.so", "libtorch.so", "libtorch_cpu.so"}
# What the stable C++ headers call, all in C: any other function of libtorch comes and goes.
SHIMS = (
    "torch/csrc/stable/c/shim.h",
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",
)
# The compiler's own start files put these into every library; they may be missing.
WEAK = {
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
    "__cxa_finalize",
    "__gmon_start__",
}


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiler() -> list[str]:
    return shlex.split(compile.find_compiler())


def needed(library: Path) -> set[str]:
    """The libraries that this one asks the loader for."""
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "-d", library)))


def undefined_symbols(library: Path) -> set[str]:
    """The symbols that this library wants from others, without their versions."""
    lines = output("nm", "--dynamic", "--undefined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def target_version() -> str:
    """The libtorch that the libraries are built for, as torch's headers write it."""
    header = (decisions.source_dir() / "torch" / "abi.h").read_text()
    (version,) = re.findall(r"#define TORCH_TARGET_VERSION (0x[0-9a-f]{16})", header)
    return version


@functools.cache
def stable_functions(version: str) -> frozenset[str]:
    """The C functions of the stable ABI as of a version of libtorch.

    The headers tell themselves: what came later stands behind an #if on the target version.
    """
    flags = [f"-DTORCH_TARGET_VERSION={version}", decisions.CUDA_FLAG, f"-I{TORCH / 'include'}"]
    includes = [word for shim in SHIMS for word in ("-include", shim)]
    text = output(*compiler(), "-E", "-P", *flags, *includes, "-x", "c++", os.devnull)
    return frozenset(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def foreign_symbols(library: Path) -> set[str]:
    """The symbols that come neither from the stable ABI nor from C or C++."""
    # By what is allowed and not by what is forbidden: that libtorch exports a symbol does not make
    # it libtorch's (its wheels hold parts of the C++ runtime), and what it exports beside C++
    # functions of at:: and c10:: (BLAS, for one) is as little for others to use.
    runtimes = [ctypes.CDLL(name) for name in needed(library) - torchs_libraries()]
    wanted = undefined_symbols(library) - stable_functions(target_version()) - WEAK
    return {name for name in wanted if not any(defines(runtime, name) for runtime in runtimes)}


def torchs_libraries() -> set[str]:
    return {path.name for path in (TORCH / "lib").iterdir()}


def defines(library: ctypes.CDLL, symbol: str) -> bool:
    """Whether the library or one that it needs has the symbol."""
    try:
        library[symbol]
    except AttributeError:
        return False
    return True


def test_what_is_audited() -> None:
    """All that is loaded, and the numbers that the audit goes by."""
    status = libraries.status()
    assert {path for path in (status.cpu, status.cuda) if path} <= set(LIBRARIES)
    assert FOLDER / libraries.CPU_LIBRARY in LIBRARIES
    major, minor = decisions.MINIMUM_TORCH
    assert target_version() == f"0x{major:02x}{minor:02x}{0:012x}"


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.partition(".")[0])
def test_symbols(library: Path) -> None:
    if library.name == libraries.CUDA_LIBRARY and not libraries.torch_has_cuda():
        pytest.skip("what it needs of torch is not here")
    assert foreign_symbols(library) == set()


@pytest.mark.parametrize("name", [libraries.CPU_LIBRARY, libraries.CUDA_LIBRARY])
def test_libraries_speak_the_stable_abi(name: str) -> None:
    """The audit sees the functions that it is about."""
    if FOLDER / name not in LIBRARIES:
        pytest.skip("built without CUDA")
    wanted = undefined_symbols(FOLDER / name) & stable_functions(target_version())
    assert {"torch_library_impl", "aoti_torch_get_dtype"} <= wanted


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.partition(".")[0])
def test_needed_libraries(library: Path) -> None:
    allowed = {
        libraries.CPU_LIBRARY: LINKED,
        libraries.CUDA_LIBRARY: LINKED | {"libtorch_cuda.so"},
    }[library.name]
    assert needed(library) & torchs_libraries() <= allowed
    # Any Python loads them; the CUDA runtime is linked in.
    assert [name for name in needed(library) if re.match("libpython|libcud", name)] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.partition(".")[0])
def test_nobody_else_sees_our_functions(library: Path) -> None:
    """Two libraries with the same ones, of another version say, do not take each other's."""
    lines = output("nm", "--dynamic", "--defined-only", "--demangle", library).splitlines()
    assert [line for line in lines if re.search(r"\bcbam(::|_)|\bPyInit_", line)] == []


# --------------------------------------------------------------- the audit finds what it is for

HARMLESS = """
    #include <iostream>
    #include <string>
    extern "C" int aoti_torch_get_dim(void*, long*);
    extern "C" int torch_parallel_for(long, long, long, void (*)(long, long, void*), void*);
    void f(void* tensor) {
      long dim = 0;
      aoti_torch_get_dim(tensor, &dim);
      torch_parallel_for(0, dim, 1, nullptr, nullptr);
      std::cout << std::to_string(dim);
    }
"""
# Declared by hand, because including torch's own headers takes many seconds.
FAULTS = {
    "at": (
        "namespace at { void set_num_threads(int); } void f() { at::set_num_threads(1); }",
        "_ZN2at15set_num_threadsEi",
    ),
    "exception": (
        "namespace c10 { struct Error { virtual ~Error(); }; } void g();"
        "void f() { try { g(); } catch (const c10::Error&) {} }",
        "_ZTIN3c105ErrorE",
    ),
    "caffe2": (
        "namespace caffe2 { struct TypeMeta { static void addTypeMetaData(); }; }"
        "void f() { caffe2::TypeMeta::addTypeMetaData(); }",
        "_ZN6caffe28TypeMeta15addTypeMetaDataEv",
    ),
    "blas": ('extern "C" void sgemm_(); void f() { sgemm_(); }', "sgemm_"),
    "unknown": (
        'extern "C" void aoti_torch_no_such(); void f() { aoti_torch_no_such(); }',
        "aoti_torch_no_such",
    ),
    "newer": (
        'extern "C" void torch_from_blob(); void f() { torch_from_blob(); }',
        "torch_from_blob",
    ),
    "python": ('extern "C" void PyErr_Clear(); void f() { PyErr_Clear(); }', "PyErr_Clear"),
}


def build(code: str, folder: Path) -> Path:
    library = folder / "libfault.so"
    source = folder / "fault.cpp"
    source.write_text(code)
    output(*compiler(), "-shared", "-fPIC", "-O0", source, "-o", library)
    return library


def test_harmless_symbols_pass(tmp_path: Path) -> None:
    assert foreign_symbols(build(HARMLESS, tmp_path)) == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, tmp_path: Path) -> None:
    code, symbol = FAULTS[fault]
    found = foreign_symbols(build("void g() {}" + code, tmp_path))
    assert found == {symbol}
