"""`import cbam_ext` and `python -m cbam_ext`, with and without the compiled part."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import cbam_ext

from support.packages import CHECKOUT, copy_package, run, run_python

USE_REFERENCE = """
import warnings, torch, cbam_ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        cbam_ext.CBAM(8)(torch.rand(1, 8, 4, 4))
print(len([w for w in caught if "cbam" in str(w.message)]))
print(caught[0].message)
"""


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_package(tmp_path_factory.mktemp("uncompiled"))


def test_import_does_no_work() -> None:
    """No CUDA context, no compiler machinery, no integration: no more than torch's own import."""
    look = """
import sys
print(torch.cuda.is_initialized())
unwanted = "segmentation_models_pytorch", "setuptools", "torch.utils.cpp_extension", "cbam_ext.smp"
unwanted += "sympy", "triton", "matplotlib", "timm", "filelock", "torch._dynamo"
print(*[name for name in unwanted if name in sys.modules])
"""
    ours = run_python("import torch, cbam_ext" + look, CHECKOUT)
    assert ours.splitlines()[0] == "False"
    assert ours == run_python("import torch" + look, CHECKOUT)


@pytest.mark.slow
def test_import_without_compiled_part(uncompiled: Path, tmp_path: Path) -> None:
    output = run_python(
        "import cbam_ext; print(cbam_ext.__file__, cbam_ext.building.library.is_loaded())",
        uncompiled,
        TORCH_EXTENSIONS_DIR=str(tmp_path),
    )
    assert output.split() == [str(uncompiled / "cbam_ext" / "__init__.py"), "False"]
    assert list(tmp_path.iterdir()) == []


def test_reference_with_one_warning(uncompiled: Path) -> None:
    count, message = run_python(USE_REFERENCE, uncompiled).strip().splitlines()
    assert count == "1"
    assert "cbam_ext.load()" in message
    assert f"pip install --no-build-isolation -e {uncompiled}" not in message  # no setup.py there


@pytest.mark.slow
def test_library_that_does_not_load(uncompiled: Path) -> None:
    library = uncompiled / "cbam_ext" / "libcbam_cpu.so"
    library.write_text("not a library")
    try:
        output = run_python(
            "import cbam_ext; print(cbam_ext.building.library.no_kernel_reason('cpu'))", uncompiled
        )
    finally:
        library.unlink()
    assert f"{library} is damaged: not a whole library. To mend it, call cbam_ext.load()" in output


@pytest.mark.slow
def test_checkout_hides_the_install(uncompiled: Path, tmp_path: Path) -> None:
    installed = tmp_path / "cbam_ext"
    installed.mkdir()
    (installed / "libcbam_cpu.so").touch()
    output = run_python(
        "import sys, cbam_ext\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "print(cbam_ext.building.library.no_kernel_reason('cpu'))",
        uncompiled,
    )
    assert str(uncompiled / "cbam_ext") in output
    assert str(installed) in output
    assert "Run from another folder" in output
    assert f"pip install --no-build-isolation -e {uncompiled}" in output


def test_other_devices_are_named() -> None:
    assert "not for 'mps'" in cbam_ext.building.library.no_kernel_reason("mps")


class TestDiagnostics:
    def test_json(self) -> None:
        facts = json.loads(run([sys.executable, "-m", "cbam_ext", "--json"], CHECKOUT).stdout)
        assert facts["cbam_ext"] == cbam_ext.__version__
        assert facts["cpu"]["loaded"] is True
        assert facts["build"]["version"] == cbam_ext.__version__

    @pytest.mark.slow
    def test_text(self) -> None:
        output = run([sys.executable, "-m", "cbam_ext"], CHECKOUT).stdout
        assert f"cbam_ext: {cbam_ext.__version__}" in output
        assert "libcbam_cpu.so" in output

    @pytest.mark.slow
    def test_without_compiled_part(self, uncompiled: Path) -> None:
        facts = json.loads(run([sys.executable, "-m", "cbam_ext", "--json"], uncompiled).stdout)
        assert facts["cpu"]["loaded"] is False
        assert "cbam_ext.load()" in facts["cpu"]["reason"]
        assert facts["build"] is None

    @pytest.mark.slow
    def test_nothing_that_is_broken_ends_it(self, uncompiled: Path) -> None:
        output = run(
            [sys.executable, "-m", "cbam_ext"],
            uncompiled,
            CUDA_HOME="/nowhere",
            TORCH_EXTENSIONS_DIR="/nowhere",
        ).stdout
        assert "CUDA_HOME=/nowhere has no bin/nvcc" in output


REIMPORT = """
import gc, sys, warnings
import torch
warnings.simplefilter("error")

def step(package):
    torch.manual_seed(0)
    x = torch.rand(2, 8, 5, 4, requires_grad=True)
    output = package.CBAM(8, mlp_bias=True)(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    return output, gradient, second

def flops(package):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        package.CBAM(8)(torch.rand(2, 8, 5, 4, requires_grad=True)).sum().backward()
    return counter.get_total_flops()

import cbam_ext as first
expected = step(first)
if {counted_before}:
    count = flops(first)
kept = first if {kept} else None
if not kept:
    del first
for _ in range(2):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cbam_ext"]:
        del sys.modules[name]
    gc.collect()
    import cbam_ext
    assert cbam_ext is not kept
    for package in filter(None, (cbam_ext, kept)):
        assert package.ops.has_kernels("cpu")
        assert all(map(torch.equal, step(package), expected))
assert flops(cbam_ext) > 0 and (not {counted_before} or flops(cbam_ext) == count)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counted_before", "kept"), [(False, False), (True, True)], ids=["forgotten", "kept"]
)
def test_a_second_import(counted_before: bool, kept: bool) -> None:
    """As notebooks and plugin loaders make it: modules leave sys.modules and are imported again.
    Operators are registered by then; what was imported last has the say, and the models of the
    first import go on."""
    code = REIMPORT.format(counted_before=counted_before, kept=kept)
    assert run_python(code, CHECKOUT).endswith("done\n")


def test_a_second_import_where_nothing_is_compiled(uncompiled: Path) -> None:
    code = """
import sys, torch, cbam_ext
explained = torch.ops.cbam.forward
for name in [name for name in sys.modules if name.partition(".")[0] == "cbam_ext"]:
    del sys.modules[name]
import cbam_ext as again
assert torch.ops.cbam.forward is not explained
try:
    torch.ops.cbam.forward()
except RuntimeError as error:
    print(error)
"""
    assert "cbam_ext.load()" in run_python(code, uncompiled)
