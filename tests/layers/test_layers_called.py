"""Which layers are called, when and with what; the gates as modules; kernels around the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

import cbam_ext
from cbam_ext.layers import questions
from cbam_ext.ops import autograd, batch_norm, dispatch, gradients, phases, pieces

from support.chains import chain_of, draw_cbam
from support.samples import same_bits
from support.treatments import (
    GEOMETRIES,
    LAYERS,
    NORM_IDS,
    NORMS,
    TREATMENTS,
    assert_follows,
    dilated,
    layer_of,
)


def record(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What each layer is called with, from here on."""
    calls: list[tuple[str, Tensor]] = []
    for name, layer in module.named_modules():
        if not any(layer.children()):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: calls.append((name, args[0].detach()))
            )
    return calls


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_calls_come_as_in_the_chain(training: bool, generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=nn.BatchNorm2d).double().train(training)
    chain = chain_of(module)
    x = torch.randn(3, 8, 7, 6, generator=generator, dtype=torch.float64)
    found, expected = record(module), record(chain)
    module(x), chain(x)
    names = [name.rpartition(".")[2] for name, _ in found]
    assert names == ["fc1", "fc2", "fc1", "fc2", "conv", "norm"]
    assert [tuple(t.shape) for _, t in found] == [
        *[(3, 8), (3, 3)] * 2,
        *[(3, 2, 7, 6), (3, 1, 7, 6)],
    ]
    for (name, a), (also, b) in zip(found, expected, strict=True):
        assert name == also
        torch.testing.assert_close(a, b)


def test_an_untouched_module_calls_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("a layer was called")

    monkeypatch.setattr(cbam_ext.module, "call", refuse)
    monkeypatch.setattr(cbam_ext.layers.gates, "call", refuse)
    for norm_layer in NORMS[:2]:
        module = draw_cbam(norm_layer=norm_layer)
        for mode in (True, False):
            assert module.train(mode).why_not_fused() is None
            module(torch.randn(2, 8, 5, 5, requires_grad=True))
            module(torch.randn(2, 8, 5, 5))


def test_the_shortcut_says_what_the_questions_say() -> None:
    module = draw_cbam()
    quick = questions.read_quickly(module.channel, module.spatial)
    assert quick is not None
    expected = [p for n in LAYERS for p in (layer_of(module, n).weight, layer_of(module, n).bias)]
    assert all(a is b for a, b in zip(quick, expected, strict=True))
    assert all(a is b for a, b in zip(module._read_layers(), expected, strict=True))
    for name in LAYERS:
        for treat in TREATMENTS:
            other = copy.deepcopy(module)
            treat(other, name)
            assert questions.read_quickly(other.channel, other.spatial) is None, treat.__name__
    assert all(a is b for a, b in zip(module._read_quickly(), expected, strict=True))
    for geometry in GEOMETRIES:
        other = copy.deepcopy(module)
        geometry(other.spatial.conv)
        assert questions.read_quickly(other.channel, other.spatial) is None, geometry.__name__


def test_a_sparse_weight(generator: torch.Generator) -> None:
    """Which nn.Linear multiplies by and the operator does not read."""
    module = draw_cbam()
    chain = chain_of(module)
    x = torch.randn(2, 8, 6, 5, generator=generator)
    for each in (module, chain):
        fc1 = each.channel.fc1
        fc1.weight = nn.Parameter(fc1.weight.detach().to_sparse_csr(), requires_grad=False)
    assert module.why_not_fused() == "layers are called: a parameter is no plain tensor"
    with torch.no_grad():
        torch.testing.assert_close(module(x), chain(x))


def test_what_is_undone_leaves_nothing(generator: torch.Generator) -> None:
    module = draw_cbam()
    x = torch.randn(2, 8, 6, 5, generator=generator)
    before = module(x)
    for name in LAYERS:
        handle = layer_of(module, name).register_forward_hook(lambda _, __, out: 2 * out)
        assert module.why_not_fused() == f"layers are called: {name} has hooks"
        assert not torch.equal(module(x), before)
        handle.remove()
        assert module.why_not_fused() is None
        assert same_bits(module(x), before)


def test_hooks_of_all_modules(generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=nn.BatchNorm2d).eval()
    chain = chain_of(module)
    x = torch.randn(2, 8, 6, 5, generator=generator)
    calls: list[type[nn.Module]] = []
    handle = register_module_forward_hook(lambda each, *_: calls.append(type(each)))
    try:
        assert module.why_not_fused() == "layers are called: all modules have hooks"
        found, ours = module(x), list(calls)
        calls.clear()
        torch.testing.assert_close(found, chain(x))
    finally:
        handle.remove()
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)
    assert [c for c in ours if c in kinds] == [c for c in calls if c in kinds]
    assert len(ours) == 7  # six layers and the module


def test_classes_that_were_patched(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    module = draw_cbam(norm_layer=nn.BatchNorm2d).eval()
    chain = chain_of(module)
    x = torch.randn(2, 8, 6, 5, generator=generator)
    before = module(x)
    for kind in (nn.Linear, nn.Conv2d, nn.BatchNorm2d):
        with monkeypatch.context() as patch:
            forward = kind.forward
            patch.setattr(kind, "forward", lambda self, t, f=forward: 2 * f(self, t))
            assert module.why_not_fused() is not None
            torch.testing.assert_close(module(x), chain(x))
            assert not torch.allclose(module(x), before)
    assert module.why_not_fused() is None


@contextmanager
def noted_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    names: list[str] = []

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(namespace: str, name: str, *arguments: Any) -> Any:
            names.append(name)
            return function(namespace, name, *arguments)

        return noting

    with monkeypatch.context() as patch:
        for module in (autograd, batch_norm, dispatch, gradients, phases, pieces):
            for name in ("below_autograd", "call"):
                if hasattr(module, name):
                    patch.setattr(module, name, note(getattr(module, name)))
        yield names


@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
def test_kernels_do_what_is_around(
    norm_layer: Any, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    module = draw_cbam(norm_layer=norm_layer)
    dilated(module.spatial.conv)
    x = torch.randn(2, 8, 6, 5, generator=generator, requires_grad=True)
    with noted_kernels(monkeypatch) as names:
        module(x).sum().backward()
    around = ["_pool", "_channel_stats", "_apply", "_apply_backward", "_channel_stats_backward"]
    assert [n for n in dict.fromkeys(names) if n in around or n == "_pool_backward"] == [
        *around,
        "_pool_backward",
    ]
    with torch.no_grad(), noted_kernels(monkeypatch) as names:
        module(x)
    assert [n for n in dict.fromkeys(names) if n.startswith("_")] == around[:3]


# ---------------------------------------------------------------------------------- the two gates


@pytest.mark.parametrize("name", ["channel", "spatial"])
@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
def test_hooks_on_a_gate(name: str, norm_layer: Any, generator: torch.Generator) -> None:
    """They see the input of the gate and the gate, and may replace both."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], gate: Tensor) -> Tensor:
        seen.extend((args[0].detach(), gate.detach()))
        return gate / 2

    def treat(each: nn.Module) -> None:
        each.get_submodule(name).register_forward_pre_hook(lambda _, args: (2 * args[0],))
        each.get_submodule(name).register_forward_hook(note)

    module = assert_follows(treat, generator, norm_layer=norm_layer, steps=1)
    assert module.why_not_fused() == f"layers are called: {name} has hooks"
    ours, theirs = seen[:2], seen[2:4]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert ours[1].shape == ((3, 8, 1, 1) if name == "channel" else (3, 1, 7, 6))


def test_gates_that_were_replaced(generator: torch.Generator) -> None:
    class Half(nn.Module):
        def __init__(self, gate: nn.Module) -> None:
            super().__init__()
            self.gate = gate

        def forward(self, input: Tensor) -> Tensor:
            return self.gate(input) / 2

    for name in ("channel", "spatial"):
        module = assert_follows(
            lambda each, name=name: setattr(each, name, Half(getattr(each, name))), generator
        )
        assert module.why_not_fused() == f"layers are called: {name} is a Half"


def test_gates_with_a_forward_of_their_own(generator: torch.Generator) -> None:
    def halve(gate: nn.Module) -> None:
        forward = gate.forward
        gate.forward = lambda x: forward(x) / 2

    for name in ("channel", "spatial"):
        module = assert_follows(lambda each, name=name: halve(getattr(each, name)), generator)
        assert module.why_not_fused() == f"layers are called: {name} has a forward of its own"


def test_a_gate_can_be_called(generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=nn.BatchNorm2d).eval()
    x = torch.randn(2, 8, 6, 5, generator=generator)
    channel_gate, spatial_gate = module.attention(x)
    torch.testing.assert_close(module.channel(x), channel_gate)
    torch.testing.assert_close(module.spatial(x * channel_gate), spatial_gate)


def test_a_norm_can_be_deleted(generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=nn.BatchNorm2d)
    x = torch.randn(2, 8, 6, 5, generator=generator)
    del module.spatial.norm
    bare = draw_cbam()
    bare.load_state_dict(module.state_dict())
    assert torch.equal(module(x), bare(x))
    assert module.why_not_fused() is None
    assert cbam_ext.to_plain(module)(x).shape == x.shape
    with pytest.raises(AttributeError):
        del module.spatial.nothing


# ------------------------------------------------------------------------------ parametrizations


PURE = {"weight_norm": parametrizations.weight_norm, "orthogonal": parametrizations.orthogonal}


@pytest.mark.parametrize("name", PURE)
def test_pure_parametrizations_stay_fused(name: str, generator: torch.Generator) -> None:
    def treat(each: nn.Module) -> None:
        torch.manual_seed(0)
        for layer in LAYERS:
            PURE[name](layer_of(each, layer))

    assert assert_follows(treat, generator).why_not_fused() is None


def test_attention_while_weights_are_cached(generator: torch.Generator) -> None:
    modules = [draw_cbam() for _ in range(4)]
    for module in modules:
        for layer in LAYERS:
            parametrize.register_parametrization(layer_of(module, layer), "weight", nn.Tanh())
    x = torch.randn(2, 8, 6, 5, generator=generator)
    expected = [module.attention(x) for module in modules]
    with parametrize.cached():
        for module, gates in zip(modules, expected, strict=True):
            for a, b in zip(module.attention(x), gates, strict=True):
                torch.testing.assert_close(a, b)


def test_spectral_norm_is_asked_as_often_as_in_the_chain(generator: torch.Generator) -> None:
    """Each reading of its weight moves its vectors on, in training."""

    def treat(each: nn.Module) -> None:
        torch.manual_seed(0)
        for layer in LAYERS:
            parametrizations.spectral_norm(layer_of(each, layer))

    module = assert_follows(treat, generator)
    reason = "layers are called: channel.fc1 is parametrized by _SpectralNorm"
    assert module.why_not_fused() == reason
    assert assert_follows(treat, generator, training=False).why_not_fused() is None
