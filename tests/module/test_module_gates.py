"""One gate alone: values, gradients, state, and the ways that a module may go."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import cbam_ext

from support.samples import assert_close, draw_like

ALONE = ["channel", "spatial"]
NORMS = [None, nn.BatchNorm2d, nn.InstanceNorm2d]
NORM_IDS = ["no norm", "BatchNorm2d", "InstanceNorm2d"]


def chain(module: cbam_ext.CBAM, x: Tensor) -> Tensor:
    """The paper's formula with the layers of ``module``, of which one gate may be missing."""
    if module.channel is not None:
        fc1, fc2 = module.channel.fc1, module.channel.fc2
        pooled = (x.mean((2, 3)), x.flatten(2).max(2).values)
        x = x * torch.sigmoid(sum(fc2(F.relu(fc1(p))) for p in pooled))[..., None, None]
    if module.spatial is not None:
        logits = module.spatial.conv(torch.stack([x.mean(1), x.max(1).values], 1))
        if module.spatial.norm is not None:
            logits = module.spatial.norm(logits)
        x = x * torch.sigmoid(logits)
    return x


def make(gates: str, norm: Callable[[int], nn.Module] | None = None, **options) -> cbam_ext.CBAM:
    options = {"mlp_bias": True, "conv_bias": True, **options}
    return cbam_ext.CBAM(12, 3, kernel_size=5, norm_layer=norm, gates=gates, **options)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


# --------------------------------------------------------------------------------- what there is


def test_state_dict() -> None:
    channel = {"channel.fc1.weight": (4, 64), "channel.fc2.weight": (64, 4)}
    spatial = {"spatial.conv.weight": (1, 2, 7, 7)}
    assert shapes(cbam_ext.CBAM(64, gates="both")) == channel | spatial
    assert shapes(cbam_ext.CBAM(64, gates="channel")) == channel
    assert shapes(cbam_ext.CBAM(64, gates="spatial")) == spatial
    assert shapes(cbam_ext.CBAM(None, gates="spatial")) == spatial
    both = make("both", nn.BatchNorm2d)
    for gates in ALONE:
        module = make(gates, nn.BatchNorm2d)
        own = {n: s for n, s in shapes(both).items() if n.startswith(gates)}
        assert shapes(module) == own
        module.load_state_dict({n: t for n, t in both.state_dict().items() if n in own})


@pytest.mark.parametrize("gates", ["both", *ALONE])
def test_what_a_module_says_of_itself(gates: str) -> None:
    module = make(gates, nn.BatchNorm2d)
    assert module.gates == gates
    assert ("gates=" in repr(module)) == (gates != "both")
    assert ("hidden_channels=4" in repr(module)) == (gates != "spatial")
    assert ("kernel_size=5" in repr(module)) == (gates != "channel")
    assert module.why_not_fused() is None


def test_bad_gates() -> None:
    with pytest.raises(ValueError, match="gates must be one of 'both', 'channel', 'spatial', got"):
        cbam_ext.CBAM(16, gates="none")
    for gates in ("both", "channel"):
        with pytest.raises(TypeError, match="in_channels must be an int, got NoneType"):
            cbam_ext.CBAM(None, gates=gates)


def test_options_of_a_gate_that_is_not_there_have_no_effect() -> None:
    """An ablation hands the same options to all three."""
    assert [*cbam_ext.CBAM(16, gates="channel", norm_layer=nn.BatchNorm2d).children()] != []
    assert shapes(cbam_ext.CBAM(16, gates="spatial", mlp_bias=False, init="identity")) == {
        "spatial.conv.weight": (1, 2, 7, 7),
        "spatial.conv.bias": (1,),
    }


@pytest.mark.parametrize("gates", ALONE)
def test_identity(gates: str, generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(16, gates=gates, init="identity")
    x = torch.randn(2, 16, 5, 6, generator=generator)
    torch.testing.assert_close(module(x), torch.sigmoid(torch.tensor(5.0)) * x)


def test_a_gate_is_taken_away(generator: torch.Generator) -> None:
    x = torch.randn(2, 12, 7, 6, generator=generator)
    module = make("both").eval()
    module.spatial = None
    assert module.gates == "channel"
    assert_close(module(x).detach(), chain(module.double(), x.double()).detach(), "output")


def test_no_gate_at_all() -> None:
    module = make("channel")
    module.channel = None
    with pytest.raises(ValueError, match="weights of at least one gate"):
        module(torch.rand(1, 12, 4, 4))


# ----------------------------------------------------------------------------- values, gradients


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS, ids=NORM_IDS)
@pytest.mark.parametrize("gates", ALONE)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_against_the_chain(
    gates: str,
    norm: Callable[[int], nn.Module] | None,
    training: bool,
    layout: torch.memory_format,
    generator: torch.Generator,
) -> None:
    module = make(gates, norm).train(training)
    exact = copy.deepcopy(module).double()
    x = torch.randn(3, 12, 9, 8, generator=generator).contiguous(memory_format=layout)
    g = draw_like(x, generator)
    x.requires_grad_()
    output = module(x)
    assert output.is_contiguous(memory_format=layout)
    found = torch.autograd.grad(output, [x, *module.parameters()], g)
    wide = x.detach().double().requires_grad_()
    expected = chain(exact, wide)
    wanted = torch.autograd.grad(expected, [wide, *exact.parameters()], g.double())
    assert_close(output.detach(), expected.detach(), "output")
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
    for (name, a), b in zip(module.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), msg=name)


@pytest.mark.parametrize("gates", ALONE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(gates: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    module = make(gates).to(dtype)
    x = torch.randn(2, 12, 9, 8, generator=generator).to(dtype)
    exact = chain(copy.deepcopy(module).double(), x.double()).detach()
    assert_close(module(x).detach(), exact, "output")
    with torch.autocast("cpu", dtype):
        assert torch.equal(module.float()(x), module(x))


@pytest.mark.parametrize("gates", ALONE)
def test_double_backward(gates: str, generator: torch.Generator) -> None:
    module = make(gates).double()
    x = torch.randn(2, 12, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(module, (x,))


# --------------------------------------------------------------------------------- layers called


@pytest.mark.parametrize("what", ["layer", "gate", "all"])
@pytest.mark.parametrize("gates", ALONE)
def test_hooks_see_their_layers(gates: str, what: str, generator: torch.Generator) -> None:
    module = make(gates, nn.BatchNorm2d).eval()
    x = torch.randn(2, 12, 7, 6, generator=generator)
    expected = module(x)
    gate = getattr(module, gates)
    layer = gate.fc2 if gates == "channel" else gate.conv
    seen = []
    if what == "all":
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    else:
        hooked = layer if what == "layer" else gate
        handle = hooked.register_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert module.why_not_fused() is not None
        output = module(x)
    finally:
        handle.remove()
    assert (layer if what != "gate" else gate) in seen
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("gates", ALONE)
def test_a_pruned_layer(gates: str, generator: torch.Generator) -> None:
    module = make(gates)
    gate = getattr(module, gates)
    layer = gate.fc1 if gates == "channel" else gate.conv
    prune.l1_unstructured(layer, "weight", 0.5)
    x = torch.randn(2, 12, 7, 6, generator=generator)
    torch.testing.assert_close(module(x), chain(module, x))


@pytest.mark.parametrize("called", [False, True], ids=["read", "called"])
@pytest.mark.parametrize("gates", ALONE)
def test_attention(gates: str, called: bool, generator: torch.Generator) -> None:
    """One that is not there is one everywhere, and gradients go through the other."""
    module = make(gates)
    if called:
        next(getattr(module, gates).children()).register_forward_hook(lambda *_: None)
    x = torch.randn(2, 12, 7, 6, generator=generator, requires_grad=True)
    channel_gate, spatial_gate = module.attention(x)
    assert channel_gate.shape == (2, 12, 1, 1) and spatial_gate.shape == (2, 1, 7, 6)
    missing = spatial_gate if gates == "channel" else channel_gate
    assert torch.equal(missing, torch.ones_like(missing))
    torch.testing.assert_close(channel_gate * spatial_gate * x, module(x))
    (channel_gate.sum() + spatial_gate.sum()).backward()
    exact = copy.deepcopy(module).double()
    wide = x.detach().double().requires_grad_()
    gate = chain(exact, wide) / wide.detach()
    (gate[:, :, 0, 0] if gates == "channel" else gate[:, 0]).sum().backward()
    if gates == "channel":  # through the gate alone, not through its product
        direct = torch.zeros_like(wide)
        direct[:, :, 0, 0] = (gate[:, :, 0, 0] / wide[:, :, 0, 0]).detach()
    else:
        direct = torch.zeros_like(wide)
        direct[:, 0] = (gate[:, 0] / wide[:, 0]).detach()
    torch.testing.assert_close(x.grad.double(), wide.grad - direct, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- the ways they go


@pytest.mark.parametrize("norm", NORMS[:2], ids=NORM_IDS[:2])
@pytest.mark.parametrize("gates", ALONE)
def test_copies_scripts_and_programs(
    gates: str, norm: Callable[[int], nn.Module] | None, generator: torch.Generator
) -> None:
    module = make(gates, norm).eval()
    x = torch.randn(2, 12, 7, 6, generator=generator)
    expected = module(x)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "script": torch.jit.script(module),
        "trace": torch.jit.trace(module, x),
        "export": torch.export.export(module, (x,)).module(),
        "fx": torch.fx.symbolic_trace(module),
        "fx, inside": torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), module)),
        "compile": torch.compile(module, backend="aot_eager", fullgraph=True),
        "decomposed": torch.export.export(module, (x,))
        .run_decompositions(cbam_ext.decompositions())
        .module(),
    }
    for name, way in ways.items():
        torch.testing.assert_close(way(x), expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("gates", ["both", *ALONE])
def test_flops_are_those_of_the_chain(gates: str) -> None:
    module, x = make(gates), torch.rand(2, 12, 7, 6)
    counts = []
    for function in (module, lambda x: chain(module, x)):
        with FlopCounterMode(display=False) as counter:
            function(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("gates", ALONE)
def test_transforms(gates: str, generator: torch.Generator) -> None:
    module = make(gates).double()
    parameters = dict(module.named_parameters())
    x = torch.randn(3, 2, 12, 4, 3, generator=generator, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, one in enumerate(x):
        alone = torch.autograd.grad(loss(parameters, one), [*parameters.values()])
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][i], gradient)
    _, tangent = torch.func.jvp(module, (x[0],), (x[1],))
    _, expected = torch.func.jvp(lambda x: chain(module, x), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, expected)
