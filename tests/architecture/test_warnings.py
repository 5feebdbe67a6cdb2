"""Our C++ compiles without a warning, and the compiler tells when a dtype is forgotten."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]
CSRC = CHECKOUT / "csrc"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
MACROS = ('-DCBAM_VERSION="0"',)  # that builds define
# Kernels are compiled as plain C++ with the headers of the emulation; what runs on a GPU alone has
# no place there.
EMULATION = (f"-I{CHECKOUT / 'tests' / 'emulation' / 'include'}", "-Wno-unknown-pragmas")
NEED_CUDA = {"torch/cuda.cpp", "cuda/device.cu"}


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        pytest.skip("no C++ compiler")
    return command


def complaints(file: Path, *flags: str) -> str:
    mode = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-x", "c++"]
    done = subprocess.run(
        [*compiler(), *mode, *WARNINGS, *MACROS, *flags, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.stdout


def sources() -> list[str]:
    lines = (CSRC / "sources.txt").read_text().splitlines()
    words = [line.partition("#")[0].split() for line in lines]
    listed = {pair[1] for pair in words if pair and pair[0] in ("cpu", "cuda")}
    return sorted(listed - NEED_CUDA)


@pytest.mark.slow
@pytest.mark.parametrize("file", sources())
def test_no_warnings(file: str) -> None:
    headers = Path(torch.__file__).resolve().parent / "include"
    flags = EMULATION if file.endswith(".cu") else (f"-isystem{headers}",)
    assert complaints(CSRC / file, *flags) == ""


SWITCH = """
#include "dtype.h"
int64_t f(cbam::DType dtype) {
  return cbam::with_storage<cbam::BFloat16, cbam::Half>(
      dtype, [](auto value) { return int64_t{sizeof(value)}; });
}
"""


def test_a_forgotten_dtype_is_named(tmp_path: Path) -> None:
    header = (CSRC / "dtype.h").read_text()
    (tmp_path / "switch.cpp").write_text(SWITCH)
    (tmp_path / "dtype.h").write_text(header)
    assert complaints(tmp_path / "switch.cpp") == ""
    assert "kFloat16 };" in header
    (tmp_path / "dtype.h").write_text(header.replace("kFloat16 };", "kFloat16, kFloat8 };"))
    assert "kFloat8" in complaints(tmp_path / "switch.cpp")
