"""Leaving Python: torch.export, AOTInductor, TorchScript, and plain ATen."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor, nn

import cbam_ext

from support import forks
from support.backends import Backend
from support.operators import NAMES as OPERATORS
from support.operators import calls
from support.samples import FEW, Problem, assert_gradients_close, draw, draw_like

DYNAMIC = {0: "batch", 2: "height", 3: "width"}

NORMS = [None, nn.BatchNorm2d, nn.InstanceNorm2d]


def _sizes() -> dict[int, torch.export.Dim]:
    return {place: torch.export.Dim(name, min=2) for place, name in DYNAMIC.items()}


def _export(
    model: nn.Module, x: Tensor, strict: bool = False
) -> torch.export.exported_program.ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=(_sizes(),), strict=strict)


def _targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


# ------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_one_node_for_all_sizes(strict: bool, training: bool, generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6, mlp_bias=True).train(training)
    program = _export(module, torch.randn(2, 6, 5, 7, generator=generator), strict)
    for exported in (program, program.run_decompositions()):
        names = [name for name in _targets(exported.graph) if "sym_size" not in name]
        assert names == ["cbam.forward.default"]
    other = torch.randn(5, 6, 9, 3, generator=generator)
    assert torch.equal(program.module()(other), module(other))


def test_a_norm_that_does_not_train_is_folded(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6, norm_layer=nn.BatchNorm2d).eval()
    x = torch.randn(2, 6, 5, 7, generator=generator)
    program = torch.export.export(module, (x,))
    targets = _targets(program.graph)
    assert targets.count("cbam.forward.default") == 1
    assert not any("batch_norm" in target or "cbam._" in target for target in targets)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("norm_layer", NORMS)
def test_an_exported_model_trains(
    norm_layer: type[nn.Module] | None, strict: bool, generator: torch.Generator
) -> None:
    """Its nodes are operators alone, whose gradients are the module's."""
    module = cbam_ext.CBAM(6, norm_layer=norm_layer, mlp_bias=True)
    x = torch.randn(2, 6, 5, 7, generator=generator)
    exported = _export(module, x, strict).module()
    upstream = draw_like(x, generator)
    _assert_trains_alike(exported, module, x, upstream)


def _assert_trains_alike(
    model: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, upstream: Tensor
) -> None:
    results = []
    for call in (model, module):
        leaf = x.clone().requires_grad_()
        output = call(leaf)
        output.backward(upstream)
        gradients = {name: p.grad for name, p in call.named_parameters()}
        results.append((output, leaf.grad, gradients))
        assert all(gradient is not None for gradient in gradients.values())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- plain ATen


@pytest.mark.parametrize("norm_layer", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_decomposed_models_hold_no_operator_of_ours(
    norm_layer: type[nn.Module] | None, training: bool, generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(6, norm_layer=norm_layer, conv_bias=True).train(training)
    program = _export(module, torch.randn(2, 6, 5, 7, generator=generator))
    program = program.run_decompositions(cbam_ext.decompositions())
    assert not any("cbam" in target for target in _targets(program.graph))
    other = torch.randn(4, 6, 3, 8, generator=generator)
    torch.testing.assert_close(program.module()(other), module(other), rtol=1e-4, atol=1e-5)


def test_every_operator_has_a_decomposition() -> None:
    expected = {getattr(torch.ops.cbam, name).default for name in OPERATORS}
    assert cbam_ext.decompositions().keys() == expected


@pytest.mark.parametrize("problem", FEW, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_decompositions_compute_the_same(
    backend: Backend, name: str, problem: Problem, generator: torch.Generator
) -> None:
    arguments = draw(problem, generator, backend.device)
    call = calls(backend.ops, arguments, generator)[name]
    decomposition = cbam_ext.decompositions()[getattr(torch.ops.cbam, name).default]
    for flags in [(), (True, False, False), (False, True, False), (False, False, True)]:
        if flags and call[-1] is not True:
            break
        given = (*call[:-3], *flags) if flags else call
        found, expected = decomposition(*given), getattr(backend.ops, name)(*given)
        # Sums in another order: of a gradient of float16, next to nothing may be left.
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-2)
        if problem.dtype == torch.float64:
            torch.testing.assert_close(found, expected)


def test_decomposed_training(generator: torch.Generator) -> None:
    """Forward and backward of a compiler that knows PyTorch's own operators only."""
    arguments = draw(Problem((2, 6, 5, 7), 5, 3, torch.float64, biases="12c"), generator)
    upstream = draw_like(arguments.input, generator)
    seen: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.update(_targets(graph.graph))
        return make_boxed_func(graph.forward)

    function = aot_function(
        torch.ops.cbam.forward, compiler, decompositions=cbam_ext.decompositions()
    )
    leaves = [t.requires_grad_() for t in arguments]
    gradients = torch.autograd.grad(function(*leaves), leaves, upstream)
    assert seen and not any("cbam" in name for name in seen)
    assert_gradients_close(gradients, arguments, upstream)


# ---------------------------------------------------------------------- packages for other programs


@pytest.mark.slow
def test_aot_inductor_package_in_a_fresh_process(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), cbam_ext.CBAM(6), nn.ReLU()).eval()
    program = _export(model, torch.randn(2, 3, 5, 7, generator=generator))
    # Headers compiled beforehand, and optimised code, would be for this one package.
    options = {"precompile_headers": False, "compile_wrapper_opt_level": "O0"}
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={
            "cpp_cache_precompile_headers": False,
            **{f"aot_inductor.{name}": value for name, value in options.items()},
        },
    )
    x = torch.randn(3, 3, 9, 4, generator=generator)
    torch.save((x, model(x)), tmp_path / "expected.pt")
    code = """
import sys, torch, cbam_ext
import torch._inductor.codecache  # which torch 2.10 forgets
model = torch._inductor.aoti_load_package(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(model(x), expected)
"""
    done = forks.with_torch().run(code, package, tmp_path / "expected.pt")
    assert done.returncode == 0, done.stderr


def _scripted(module: nn.Module, _: Tensor) -> torch.jit.ScriptModule:
    return torch.jit.script(module)


def _traced(module: nn.Module, x: Tensor) -> torch.jit.ScriptModule:
    return torch.jit.trace(module, (x,), check_trace=False)  # a norm that trains is not repeatable


@pytest.mark.parametrize("how", [_scripted, _traced], ids=lambda how: how.__name__[1:])
@pytest.mark.parametrize("norm_layer", NORMS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript(
    how: Callable[[nn.Module, Tensor], torch.jit.ScriptModule],
    norm_layer: type[nn.Module] | None,
    training: bool,
    biases: bool,
    generator: torch.Generator,
) -> None:
    """Saved, loaded, run on another size, and trained."""
    module = cbam_ext.CBAM(6, norm_layer=norm_layer, mlp_bias=biases, conv_bias=biases)
    module.train(training)
    buffer = io.BytesIO()
    torch.jit.save(how(module, torch.randn(2, 6, 5, 7, generator=generator)), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    module.load_state_dict(loaded.state_dict())  # tracing has moved the statistics of a norm
    x = torch.randn(3, 6, 4, 9, generator=generator)
    _assert_trains_alike(loaded, module, x, draw_like(x, generator))
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())


@pytest.mark.parametrize("how", [_scripted, _traced], ids=lambda how: how.__name__[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_frozen(
    how: Callable[[nn.Module, Tensor], torch.jit.ScriptModule],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    module = cbam_ext.CBAM(6, norm_layer=nn.BatchNorm2d).to(dtype).eval()
    x, other = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 6, 5, 7), (3, 6, 4, 9)))
    frozen = torch.jit.freeze(how(module, x))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(frozen(other), module(other), rtol=tolerance, atol=tolerance)


def test_arguments_are_checked_in_exported_models(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6)
    with pytest.raises((RuntimeError, ValueError), match="fc1_weight must have shape"):
        torch.export.export(module, (torch.randn(2, 5, 4, 4, generator=generator),))
