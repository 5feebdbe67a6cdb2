"""Treated layers under torch.compile, torch.export, TorchScript and torch.fx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import cbam_ext

from support.chains import Chain, draw_cbam
from support.treatments import (
    GEOMETRIES,
    LAYERS,
    NORM_IDS,
    NORMS,
    Treatment,
    another_layer,
    dilated,
    forward_hook,
    own_forward,
)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.one_quick
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
def test_an_untouched_module_compiles_to_its_operators(
    norm_layer: Any, training: bool, generator: torch.Generator
) -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    module = draw_cbam(norm_layer=norm_layer).train(training)
    x = torch.randn(2, 8, 6, 5, generator=generator)
    for wrap in (lambda f: f, torch.no_grad()):
        torch._dynamo.reset()
        seen.clear()
        wrap(torch.compile(module, fullgraph=True, backend=backend))(x)
        assert any("cbam" in name or "autograd_function" in name for name in seen)
        assert not any("linear" in name or "conv2d" in name for name in seen)


@pytest.mark.one_quick
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    "treat", [own_forward, forward_hook, another_layer], ids=lambda treat: treat.__name__
)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled(treat: Treatment, name: str, generator: torch.Generator) -> None:
    """Treated before it was compiled, and after."""
    module = draw_cbam()
    x = torch.randn(2, 8, 6, 5, generator=generator)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    treat(module, name)
    expected = module(x)
    if treat is forward_hook:  # which compiled code does not look for: skip_nnmodule_hook_guards
        torch._dynamo.reset()
    torch.testing.assert_close(compiled(x), expected)
    again = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(again(x), expected)


@pytest.mark.one_quick
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=lambda geometry: geometry.__name__)
def test_compiled_with_another_geometry(
    geometry: Callable[[nn.Conv2d], None], generator: torch.Generator
) -> None:
    module = draw_cbam()
    x = torch.randn(2, 8, 6, 5, generator=generator)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x)
    geometry(module.spatial.conv)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool, generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=nn.BatchNorm2d).eval()
    x = torch.randn(2, 8, 6, 5, generator=generator)
    dilated(module.spatial.conv)
    another_layer(module, "channel.fc1")
    program = torch.export.export(module, (x,), strict=strict)
    assert not any("cbam" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), Chain(module)(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("norm_layer", NORMS[:2], ids=NORM_IDS[:2])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(how: str, norm_layer: Any, generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=norm_layer).eval()
    x = torch.randn(2, 8, 6, 5, generator=generator)
    dilated(module.spatial.conv)
    another_layer(module, "channel.fc2")
    scripted = torch.jit.script(module) if how == "script" else torch.jit.trace(module, (x,))
    torch.testing.assert_close(scripted(x), Chain(module)(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_of_hooks_is_right_or_an_error(generator: torch.Generator) -> None:
    module = draw_cbam()
    x = torch.randn(2, 8, 6, 5, generator=generator)
    own_forward(module, "channel.fc1")
    with pytest.raises(Exception, match="."):  # the chain's: what cannot be compiled
        torch.jit.script(module)
    torch.testing.assert_close(torch.jit.trace(module, (x,))(x), Chain(module)(x))


# ----------------------------------------------------------------------------------- torch.fx


def test_fx_keeps_the_module(generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=nn.BatchNorm2d).eval()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), module, nn.ReLU())
    x = torch.randn(2, 3, 6, 5, generator=generator)
    traced = torch.fx.symbolic_trace(model)
    assert [str(n.target) for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(traced(x), model(x))
    forward_hook(module, "channel.fc1")  # what is done later counts as well
    assert torch.equal(traced(x), model(x))


def test_fx_of_the_module_itself(generator: torch.Generator) -> None:
    x = torch.randn(2, 8, 6, 5, generator=generator)
    module = draw_cbam()
    traced = torch.fx.symbolic_trace(module)
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert targets == [cbam_ext.cbam]
    assert torch.equal(traced(x), module(x))
    for treat in (dilated, lambda conv: None):
        module = draw_cbam(norm_layer=nn.BatchNorm2d).eval()
        treat(module.spatial.conv)
        torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), Chain(module)(x))


def test_fx_of_the_function(generator: torch.Generator) -> None:
    module = draw_cbam()
    x = torch.randn(2, 8, 6, 5, generator=generator)
    parameters = [p if p is None else p.detach() for p in module._read_layers()]
    traced = torch.fx.symbolic_trace(lambda t: cbam_ext.cbam(t, *parameters))
    assert torch.equal(traced(x), module(x))
