"""``.attention(x)``: both gates, with gradients, and nothing of the module changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

import cbam_ext
from cbam_ext import ops, reference

from support.backends import Backend
from support.chains import Chain, chain_of, draw_cbam
from support.samples import LIMITS, PROBLEMS, Arguments, draw, draw_like, in_float64, same_bits
from support.treatments import LAYERS, NORM_IDS, NORMS, dilated, forward_hook


def plain_gates(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    gate = reference.channel_gate(*arguments[:5])
    return gate, torch.sigmoid(reference.spatial_logits(arguments[0], gate, *arguments[5:]))


def chain_gates(chain: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    gate = chain.channel(x)
    return gate, chain.spatial(x * gate)


def gradients(
    gates: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Sequence[Tensor], **how: Any
) -> list[Tensor | None]:
    weighted = [(gate * up).sum() for gate, up in zip(gates, upstream, strict=True)]
    return list(torch.autograd.grad(sum(weighted), leaves, allow_unused=True, **how))


@pytest.mark.emulate(one_in=11)
@pytest.mark.parametrize("problem", PROBLEMS[::3], ids=str)
def test_gradients(backend: Backend, problem: Any, generator: torch.Generator) -> None:
    """Of both gates at once, against the float64 reference."""
    arguments = draw(problem, generator, backend.device)
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    exact = [None if t is None else t.requires_grad_() for t in in_float64(arguments)]
    gates, expected = ops.gates(*leaves, namespace=backend.namespace), plain_gates(*exact)
    upstream = [draw_like(gate.detach(), generator) for gate in expected]
    given = [u.to(g.device, g.dtype) for u, g in zip(upstream, gates, strict=True)]
    present = [t for t in leaves if t is not None]
    found = gradients(gates, present, given)
    truth = gradients(expected, [t for t in exact if t is not None], upstream)
    scale = max(float(t.abs().max()) for t in truth)
    for leaf, a, b in zip(present, found, truth, strict=True):
        assert a.dtype == leaf.dtype
        # Of many terms that nearly cancel: measured by the largest of all gradients.
        error = (a.detach().to("cpu", torch.float64) - b).abs().max()
        assert error <= 10 * LIMITS[problem.dtype] * max(float(b.abs().max()), 0.1 * scale)


def test_same_bits_as_the_operator(backend: Backend, generator: torch.Generator) -> None:
    arguments = draw(PROBLEMS[4], generator, backend.device)
    expected = backend.ops.gates(*arguments)
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    gates = ops.gates(*leaves, namespace=backend.namespace)
    assert all(gate.requires_grad for gate in gates)
    assert not any(gate.requires_grad for gate in backend.ops.gates(*leaves))
    for a, b in zip(gates, expected, strict=True):
        assert same_bits(a.detach(), b)


@pytest.mark.parametrize("treated", [False, True], ids=["fused", "layers called"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
def test_the_module(
    norm_layer: Any, training: bool, treated: bool, generator: torch.Generator
) -> None:
    """A loss on the gates trains the input and every parameter, twice if asked; no buffer moves."""
    module = draw_cbam(norm_layer=norm_layer).double().train(training)
    chain = chain_of(module)
    if treated:
        for each in (module, chain):
            dilated(each.spatial.conv)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(3, 8, 7, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    gates, expected = module.attention(x), chain_gates(chain, x)
    upstream = [draw_like(gate.detach(), generator) for gate in gates]
    results = []
    for found, each in ((gates, module), (expected, chain)):
        leaves = [x, *each.parameters()]
        first = gradients(found, leaves, upstream, create_graph=True)
        penalty = sum(t.square().sum() for t in first if t is not None)
        second = torch.autograd.grad(penalty, leaves, allow_unused=True)
        results.append([*found, *first, *second])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_distillation(generator: torch.Generator) -> None:
    """A student's gates learn a teacher's."""
    teacher = draw_cbam()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(4, 8, 9, 9, generator=generator)
    with torch.no_grad():
        targets = teacher.attention(x)
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        gates = student.attention(x)
        loss = sum(nn.functional.mse_loss(a, b) for a, b in zip(gates, targets, strict=True))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gates_are_those_of_forward(dtype: torch.dtype, generator: torch.Generator) -> None:
    for treat in (lambda each: None, lambda each: forward_hook(each, "channel.fc2")):
        module = draw_cbam(norm_layer=nn.BatchNorm2d).to(dtype)
        treat(module)
        x = torch.randn(3, 8, 7, 6, generator=generator).to(dtype)
        channel_gate, spatial_gate = module.attention(x)
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        assert channel_gate.dtype == spatial_gate.dtype == accumulator
        product = (channel_gate * spatial_gate * x).to(dtype)
        torch.testing.assert_close(module(x), product)


def test_layers_with_a_memory_stay_as_they_were(generator: torch.Generator) -> None:
    """The hook of spectral_norm moves its vectors in every call that trains."""
    module = draw_cbam(norm_layer=nn.BatchNorm2d)
    for name in LAYERS:
        spectral_norm(module.get_submodule(name))
    x = torch.randn(3, 8, 7, 6, generator=generator, requires_grad=True)
    before = copy.deepcopy(module.state_dict())
    gates = module.attention(x)
    sum(gate.square().sum() for gate in gates).backward()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name in LAYERS:
        assert module.get_submodule(name).weight_orig.grad is not None
    module(x)
    assert not torch.equal(
        module.state_dict()["channel.fc1.weight_u"], before["channel.fc1.weight_u"]
    )


@pytest.mark.parametrize("norm_layer", NORMS[:2], ids=NORM_IDS[:2])
def test_transforms(norm_layer: Any, generator: torch.Generator) -> None:
    module = draw_cbam(norm_layer=norm_layer).double().eval()
    chain = chain_of(module)
    x = torch.randn(2, 8, 4, 3, generator=generator, dtype=torch.float64)
    tangent = draw_like(x, generator)
    transforms: list[Callable[[Callable[[Tensor], Tensor]], Tensor]] = [
        lambda f: torch.func.grad(lambda t: f(t).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.vmap(f)(torch.stack([x, tangent])),
    ]
    for i in range(2):
        for transform in transforms:
            found = transform(lambda t, i=i: module.attention(t)[i])
            expected = transform(lambda t, i=i: chain_gates(chain, t)[i])
            torch.testing.assert_close(found, expected)


@pytest.mark.one_quick
@pytest.mark.parametrize("norm_layer", NORMS[:2], ids=NORM_IDS[:2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiled(norm_layer: Any, training: bool, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    module = draw_cbam(norm_layer=norm_layer).train(training)
    x = torch.randn(2, 8, 5, 4, generator=generator)
    results = []
    for call in (torch.compile(module.attention, backend="aot_eager"), module.attention):
        leaf = x.clone().requires_grad_()
        gates = call(leaf)
        weighted = sum(gate.square().sum() for gate in gates)
        results.append([*gates, *torch.autograd.grad(weighted, [leaf, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_arguments_are_checked() -> None:
    for treat in (lambda each: None, lambda each: forward_hook(each, "channel.fc2")):
        module = draw_cbam()
        treat(module)
        for call in (module, module.attention):
            with pytest.raises(ValueError, match="input must have 4 dimensions"):
                call(torch.rand(8, 5, 5))
            with pytest.raises(TypeError, match="input must be float64"):
                call(torch.ones(1, 8, 5, 5, dtype=torch.int64))


def test_arguments_hold_still(generator: torch.Generator) -> None:
    arguments = Arguments(*draw(PROBLEMS[0], generator))
    before = [None if t is None else t.clone() for t in arguments]
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    sum(gate.sum() for gate in cbam_ext.functional.gates(*leaves)).backward()
    for a, b in zip(arguments, before, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
