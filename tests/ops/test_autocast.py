"""Autocast: half maps meet float32 parameters; nothing is cast that need not be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cbam_ext

from support.backends import Backend
from support.samples import Arguments, assert_close, assert_gradients_close, draw_like, truth

NORMS = [None, nn.BatchNorm2d, functools.partial(nn.InstanceNorm2d, affine=True)]
NORM_IDS = ["none", "batch", "instance"]
HALVES = [torch.bfloat16, torch.float16]

# There are no modules on emulated kernels.
pytestmark = pytest.mark.on("cpu", "cuda")


class _Casts(TorchDispatchMode):
    """Notes the dtypes that are cast from and to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.seen.append((args[0].dtype, result.dtype))
        return result


def _model(backend: Backend, norm_layer: Callable[[int], nn.Module] | None) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), cbam_ext.CBAM(8, norm_layer=norm_layer, mlp_bias=True)
    )
    return model.to(backend.device)


def _arguments(module: cbam_ext.CBAM, x: Tensor) -> Arguments:
    values = (x, *module._read_layers())
    return Arguments(*(None if t is None else t.detach() for t in values))


@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cache", [True, False])
def test_behind_a_convolution(
    backend: Backend,
    norm_layer: Callable[[int], nn.Module] | None,
    dtype: torch.dtype,
    cache: bool,
    generator: torch.Generator,
) -> None:
    model = _model(backend, norm_layer)
    x = torch.randn(2, 3, 9, 8, generator=generator).to(backend.device)
    with torch.autocast(backend.device.type, dtype=dtype, cache_enabled=cache):
        inner = model[0](x)
        output = model[1](inner)
        with torch.autocast(backend.device.type, enabled=False):
            assert model[1](inner).dtype == dtype
    assert inner.dtype == output.dtype == dtype
    upstream = draw_like(output, generator)
    output.backward(upstream)
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    if norm_layer is None:
        arguments = _arguments(model[1], inner)
        assert_close(output.detach(), truth(arguments).output, "output")
        gradients = [p if p is None else p.grad for p in model[1]._read_layers()]
        assert_gradients_close([None, *gradients], arguments, upstream)


@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_ours_is_cast(
    backend: Backend,
    norm_layer: Callable[[int], nn.Module] | None,
    training: bool,
    generator: torch.Generator,
) -> None:
    """Neither the feature map, which would take longer than the kernels, nor a parameter."""
    module = _model(backend, norm_layer)[1].train(training)
    x = torch.randn(2, 8, 9, 8, generator=generator).to(backend.device, torch.bfloat16)
    x.requires_grad_()
    upstream = draw_like(x, generator)
    with _Casts() as casts, torch.autocast(backend.device.type, dtype=torch.bfloat16):
        output = module(x)
        output.backward(upstream)
    assert casts.seen == []


def test_a_float32_map_stays_float32(backend: Backend, generator: torch.Generator) -> None:
    """A layer has computed it in float32 for a reason."""
    module = _model(backend, None)[1]
    x = torch.randn(2, 8, 9, 8, generator=generator).to(backend.device)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        output = module(x)
        gates = module.attention(x)
    assert output.dtype == torch.float32
    assert torch.equal(output, module(x))
    assert all(torch.equal(a, b) for a, b in zip(gates, module.attention(x), strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_double_backward(backend: Backend, dtype: torch.dtype, generator: torch.Generator) -> None:
    """All of it under autocast, as a gradient penalty in a training step is."""
    model = _model(backend, nn.BatchNorm2d)
    x = torch.randn(2, 3, 9, 8, generator=generator).to(backend.device).requires_grad_()
    with torch.autocast(backend.device.type, dtype=dtype):
        output = model(x)
        (first,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
        penalty = first.square().sum()
    penalty.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in model[1].spatial.parameters()
    )


@pytest.mark.parametrize("norm_layer", NORMS, ids=NORM_IDS)
def test_training_with_a_grad_scaler(
    backend: Backend, norm_layer: Callable[[int], nn.Module] | None, generator: torch.Generator
) -> None:
    """float16, with its scaled loss; an overflow is noticed and skipped."""
    model = _model(backend, norm_layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=1024.0)
    x = torch.randn(4, 3, 9, 8, generator=generator).to(backend.device)
    target = torch.randn(4, 8, 7, 6, generator=generator).to(backend.device)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast(backend.device.type, dtype=torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    losses = [step(x) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert scaler.get_scale() == 1024
    before = [p.detach().clone() for p in model.parameters()]
    step(x * 1e6)
    assert scaler.get_scale() == 512
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
