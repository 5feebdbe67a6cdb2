"""Where there are no kernels: one warning, the reference's result, an operator that explains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import cbam_ext
from cbam_ext import functional, reference
from cbam_ext.ops import calls

from support.samples import (
    FEW,
    NAMES,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    true_gradients,
    truth,
)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that the library has no kernels for."""
    monkeypatch.setattr(calls, "_device_types", set())
    monkeypatch.setattr(functional, "_warned", set())


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("problem", FEW[:4], ids=str)
def test_results_are_those_of_the_reference(problem: Problem, generator: torch.Generator) -> None:
    arguments = draw(problem, generator)
    upstream = draw_like(arguments.input, generator)
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    with pytest.warns(UserWarning, match="plain PyTorch"):
        output = cbam_ext.cbam(*leaves)
    assert torch.equal(output, reference.cbam(*leaves))
    assert_close(output.detach(), truth(arguments).output, "output")
    found = iter(torch.autograd.grad(output, [t for t in leaves if t is not None], upstream))
    gradients = [None if t is None else next(found) for t in leaves]
    for name, gradient, expected in zip(
        NAMES, gradients, true_gradients(arguments, upstream), strict=True
    ):
        assert (gradient is None) == (expected is None), name
    if problem.dtype.itemsize > 2:  # plain PyTorch adds up a half gradient of the input in half
        assert_gradients_close(gradients, arguments, upstream)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d], ids=["no norm", "BatchNorm2d"])
def test_one_warning_for_any_number_of_calls(
    norm_layer: type[nn.Module] | None, generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(6, norm_layer=norm_layer)
    x = torch.randn(2, 6, 5, 5, generator=generator, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            module(x).sum().backward()
            module.attention(x)
            module.eval()(x)
    assert len(caught) == 1
    assert issubclass(caught[0].category, UserWarning)
    assert "slower" in str(caught[0].message)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "norm_layer", [None, nn.BatchNorm2d, nn.InstanceNorm2d], ids=["none", "batch", "instance"]
)
def test_the_module_computes_the_same_either_way(
    norm_layer: type[nn.Module] | None,
    training: bool,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = cbam_ext.CBAM(6, norm_layer=norm_layer, dtype=torch.float64).train(training)
    x = torch.randn(3, 6, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = draw_like(x, generator)

    def run() -> list[torch.Tensor]:
        output = module(x)
        gradients = torch.autograd.grad(output, [x, *module.parameters()], upstream)
        return [output, *module.attention(x), *gradients]

    with_kernels = run()
    monkeypatch.setattr(calls, "_device_types", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without = run()
    for a, b in zip(with_kernels, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.filterwarnings("ignore:.*plain PyTorch")
def test_autocast_does_not_round_the_accumulators(generator: torch.Generator) -> None:
    """Gates and logits stay float32 although autocast runs linear and convolution in half."""
    arguments = draw(
        Problem((2, 9, 6, 5), 3, 2, torch.bfloat16, parameters="accumulator"), generator
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = cbam_ext.cbam(*arguments)
        gates = functional.gates(*arguments)
    assert_close(output, truth(arguments).output, "output")
    for gate, expected in zip(gates, truth(arguments)[1:], strict=True):
        assert gate.dtype == torch.float32
        assert_close(gate, expected, "gate")


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.filterwarnings("ignore:.*plain PyTorch")
def test_errors_are_the_same() -> None:
    module = cbam_ext.CBAM(8)
    with pytest.raises(ValueError, match=r"fc1_weight must have shape \[R, 9\]"):
        module(torch.randn(1, 9, 4, 4))
    with pytest.raises(TypeError, match=r"input must be float64.*got int32"):
        module(torch.zeros(1, 8, 4, 4, dtype=torch.int32))


# ----------------------------------------------------------------- a package without libraries


def _run(tmp_path: Path, program: str) -> str:
    """Runs a program with a copy of the package that has the Python files only."""
    package = tmp_path / "cbam_ext"
    shutil.copytree(
        Path(cbam_ext.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "csrc"),
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_package_without_libraries(tmp_path: Path) -> None:
    out = _run(
        tmp_path,
        """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import torch, cbam_ext
    module = cbam_ext.CBAM(6)
x = torch.randn(2, 6, 5, 4, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = module(x)
    module(x)
assert len(caught) == 1, caught
y.sum().backward()
fc1, fc2, conv = module.channel.fc1, module.channel.fc2, module.spatial.conv
assert torch.equal(
    y, cbam_ext.reference.cbam(x, fc1.weight, None, fc2.weight, None, conv.weight, None)
)
print(caught[0].message)
""",
    )
    assert "not compiled" in out
    assert "cbam_ext.load()" in out or "pip install" in out


@pytest.mark.slow
def test_script_without_libraries(tmp_path: Path) -> None:
    """As the chain of layers."""
    _run(
        tmp_path,
        """
import torch, cbam_ext
for norm in (None, torch.nn.BatchNorm2d):
    module = cbam_ext.CBAM(6, norm_layer=norm).eval()
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))
""",
    )


@pytest.mark.slow
def test_operator_without_libraries_explains_itself(tmp_path: Path) -> None:
    out = _run(
        tmp_path,
        """
import torch, cbam_ext
for name in ("forward", "gates"):
    try:
        getattr(torch.ops.cbam, name)(
            torch.rand(1, 4, 3, 3), torch.rand(1, 4), None, torch.rand(4, 1), None,
            torch.rand(1, 2, 3, 3), None)
    except Exception as error:
        print(name, type(error).__name__, error)
""",
    )
    for name in ("forward", "gates"):
        (line,) = [line for line in out.splitlines() if line.startswith(name)]
        assert "cbam_ext" in line, line
        assert "pip install" in line or "cbam_ext.load()" in line, line
