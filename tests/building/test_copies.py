"""Two copies of the library in one process: that of a C++ extension, and that of the package."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import cbam_ext
from cbam_ext.building import compile
from cbam_ext.building import library as libraries

from support.packages import CHECKOUT, copy_package, run_python

# As somebody writes one: it calls the operators through the header, whoever brings them.
EXTENSION = """
#include <ATen/ATen.h>
#include <cbam/cbam.h>

extern "C" double attend() {
  const auto ramp = [](at::IntArrayRef shape) {
    const at::Tensor t = at::empty(shape);
    return at::linspace(-1, 1, t.numel()).view(shape);
  };
  const at::Tensor y =
      cbam::forward(ramp({2, 8, 5, 7}), ramp({2, 8}), {}, ramp({8, 2}), {}, ramp({1, 2, 3, 3}), {});
  return y.square().sum().item<double>();
}
"""
PROGRAM = """
import ctypes, sys, torch

def extension():
    global library
    library = ctypes.CDLL({extension!r})
    library.attend.restype = ctypes.c_double

def package():
    global cbam_ext
    import cbam_ext.plan

for load in ({order}):
    load()

def ramp(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)

def expected(function):
    x = ramp(2, 8, 5, 7).requires_grad_()
    y = function(x, ramp(2, 8), None, ramp(8, 2), None, ramp(1, 2, 3, 3), None)
    return y.detach().square().sum(), *torch.autograd.grad(y.square().sum(), x)

ours, plain = expected(cbam_ext.cbam), expected(cbam_ext.reference.cbam)
torch.testing.assert_close(ours, plain)
assert abs(library.attend() - float(plain[0])) < 1e-4 * float(plain[0])
assert cbam_ext.CBAM(8)(torch.rand(1, 8, 4, 4)).grad_fn is not None
assert cbam_ext.plan.launch_plan(torch.rand(1, 8, 4, 4))  # of the library's other file
mapped = open("/proc/self/maps").read()
print(len({{line.split()[-1] for line in mapped.splitlines() if "libcbam_cpu" in line}}))
"""


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extension, linked with a copy of the library beside it."""
    folder = tmp_path_factory.mktemp("extension")
    shutil.copy(libraries.status().cpu or libraries.PACKAGE / libraries.CPU_LIBRARY, folder)
    source, built = folder / "extension.cpp", folder / "libextension.so"
    source.write_text(EXTENSION)
    torch_folder = Path(torch.__file__).parent
    arguments = [
        str(source),
        *(f"-I{CHECKOUT / 'include'}", f"-isystem{torch_folder / 'include'}"),
        f"-isystem{torch_folder / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
        *("-Wl,--no-as-needed", f"-L{folder}", "-lcbam_cpu", "-Wl,-rpath,$ORIGIN"),
    ]
    _link(arguments, built)
    return built


def _link(arguments: list[str], library: Path) -> None:
    command = shlex.split(compile.find_compiler())
    command += ["-std=c++20", "-O0", "-shared", "-fPIC", *arguments, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("order", ["extension, package", "package, extension"])
def test_the_second_copy_leaves_the_operators_to_the_first(extension: Path, order: str) -> None:
    program = PROGRAM.format(extension=str(extension), order=order)
    copies = 1 if order.startswith("extension") else 2  # the package finds the operators there
    # Torch 2.10 has complained before that an operator is registered twice.
    assert run_python(program, CHECKOUT).splitlines()[-1] == str(copies)


@pytest.mark.slow
@pytest.mark.skipif(not libraries.torch_has_cuda(), reason="this torch has no CUDA")
def test_cuda_kernels_come_from_the_package_where_the_extension_has_none(
    extension: Path, tmp_path: Path
) -> None:
    package = copy_package(tmp_path) / "cbam_ext"
    stub = package / libraries.CUDA_LIBRARY
    version = f'-DCBAM_VERSION="{cbam_ext.__version__}"'
    _link([version, str(CHECKOUT / "csrc" / "library" / "identity.cpp")], stub)
    program = f"""
import ctypes, torch
ctypes.CDLL({str(extension)!r})
import cbam_ext
print(cbam_ext.building.library.status().cuda)
"""
    assert run_python(program, tmp_path).splitlines()[-1] == str(stub)
