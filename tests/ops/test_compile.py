"""torch.compile: whole graphs, right gradients, no compilation without need."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import cbam_ext

from support.backends import Backend
from support.samples import FEW, Problem, assert_gradients_close, draw, draw_like, same_bits


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("problem", FEW[:2], ids=str)
def test_the_operator_stays_whole(
    backend: Backend, problem: Problem, generator: torch.Generator
) -> None:
    arguments = draw(problem, generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    present = [t for t in leaves if t is not None]
    compiled = torch.compile(backend.ops.forward, fullgraph=True, backend="aot_eager")
    output = compiled(*leaves)
    assert output.stride() == arguments.input.stride()
    assert same_bits(output.detach(), backend.ops.forward(*leaves).detach())
    found = iter(torch.autograd.grad(output, present, grad_output))
    gradients = [None if t is None else next(found) for t in leaves]
    assert_gradients_close(gradients, arguments, grad_output)


def _compare(compiled: nn.Module, model: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    """Output and all gradients, those of the input too."""
    upstream = None
    results = []
    for call in (compiled, copy.deepcopy(model)):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = call(leaf)
        upstream = draw_like(output, generator) if upstream is None else upstream
        parameters = [p for p in call.parameters() if p.requires_grad]
        results.append([output, *torch.autograd.grad(output, [leaf, *parameters], upstream)])
    assert results[0][0].stride() == results[1][0].stride()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.one_quick
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_compilation_serves_all_sizes(
    norm_layer: type[nn.Module] | None, channels_last: bool, generator: torch.Generator
) -> None:
    """Any batch and image of at least 2 (PyTorch compiles sizes of 0 and 1 apart).

    The first size is not that of another dimension, which would count as always the same.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = cbam_ext.CBAM(6, norm_layer=norm_layer)
    compiled = torch.compile(
        copy.deepcopy(module), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for i, (n, h, w) in enumerate([(3, 5, 7), (2, 9, 4), (5, 2, 2), (4, 31, 2), (2, 3, 3)]):
        x = torch.randn(n, 6, h, w, generator=generator).to(memory_format=layout)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            _compare(compiled, module, x, generator)
    compiled.eval(), module.eval()
    with torch.no_grad():
        for i, (n, h, w) in enumerate([(3, 5, 7), (2, 9, 4), (5, 2, 2)]):
            x = torch.randn(n, 6, h, w, generator=generator).to(memory_format=layout)
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                found = compiled(x)
            assert found.stride() == x.stride()
            if norm_layer is None:  # one that trained has statistics of its own
                torch.testing.assert_close(found, module(x))


@pytest.mark.one_quick
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_between_other_layers(
    norm_layer: type[nn.Module] | None, generator: torch.Generator
) -> None:
    """As users do: inductor fuses the neighbours and calls the operators as they are."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), cbam_ext.CBAM(6, norm_layer=norm_layer), nn.ReLU()
    )
    x = torch.randn(2, 3, 9, 8, generator=generator)
    _compare(torch.compile(copy.deepcopy(model), fullgraph=True), model, x, generator)


@pytest.mark.one_quick
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_under_autocast(norm_layer: type[nn.Module] | None, generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), cbam_ext.CBAM(6, norm_layer=norm_layer))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 9, 8, generator=generator)
    results = []
    for call in (compiled, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = call(x)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        results.append([output, *(p.grad for p in call.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.on("cuda")
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_reduce_overhead(
    backend: Backend, norm_layer: type[nn.Module] | None, generator: torch.Generator
) -> None:
    """CUDA graphs: each call replays the first one's launches on new numbers."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), cbam_ext.CBAM(6, norm_layer=norm_layer))
    model = model.to(backend.device)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(2, 3, 9, 8, generator=generator).to(backend.device)
        torch.compiler.cudagraph_mark_step_begin()
        _compare(compiled, model, x, generator)
