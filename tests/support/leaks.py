"""Calls of every kind, errors included, none of which may leave anything behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import cbam_ext


def calls_of_the_operators(device: str = "cpu") -> dict[str, tuple[int, Callable[[], object]]]:
    """By name: how often to show that it leaves nothing behind, and what."""
    x = torch.randn(2, 6, 5, 4, device=device, requires_grad=True)
    plain, upstream = x.detach(), torch.randn(2, 6, 5, 4, device=device)
    half = plain.to(torch.bfloat16, memory_format=torch.channels_last).transpose(2, 3)
    module = cbam_ext.CBAM(6, mlp_bias=True, conv_bias=True, device=device)
    norm = cbam_ext.CBAM(6, norm_layer=nn.BatchNorm2d, device=device)
    folded = cbam_ext.CBAM(6, norm_layer=nn.BatchNorm2d, device=device).eval()
    parameters = module._read_layers()
    values = [None if t is None else t.detach() for t in parameters]
    wrong_shape = [values[0][:, 1:], *values[1:]]
    wrong_dtype = [values[0].double(), *values[1:]]
    maps = torch.ops.cbam.gates(plain, *values)

    def raises(error: type[Exception], function: Callable, *arguments: object) -> object:
        def call() -> None:
            try:
                function(*arguments)
            except error:
                return
            raise AssertionError(f"no {error.__name__}")

        return call

    def inference() -> None:
        with torch.inference_mode():
            module(plain)

    def penalty() -> None:
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(first.square().sum(), x)

    def loss(t: Tensor) -> Tensor:
        return cbam_ext.cbam(t, *values).square().sum()

    forward, backward = torch.ops.cbam.forward, torch.ops.cbam._backward
    gradient, per_sample = torch.func.grad(loss), torch.vmap(torch.func.grad(loss))
    samples = plain[:, None]
    return {
        "operator": (2000, lambda: forward(plain, *values)),
        "of another layout": (2000, lambda: forward(half, *values)),
        "gates": (2000, lambda: torch.ops.cbam.gates(plain, *values)),
        "graph without backward": (2000, lambda: forward(x, *parameters)),
        "step": (1000, lambda: forward(x, *parameters).backward(upstream)),
        "module": (1000, lambda: module(x).backward(upstream)),
        "norm": (1000, lambda: norm(x).backward(upstream)),
        "folded norm": (1000, lambda: folded(x).backward(upstream)),
        "module in inference mode": (2000, inference),
        "attention": (1000, lambda: norm.attention(x)),
        "error of the operator": (2000, raises(RuntimeError, forward, plain, *wrong_shape)),
        "error of a graph": (2000, raises(RuntimeError, forward, x, *wrong_shape)),
        "error of the function": (1000, raises(ValueError, cbam_ext.cbam, plain, *wrong_shape)),
        "error of a dtype": (1000, raises(TypeError, cbam_ext.cbam, plain, *wrong_dtype)),
        "error of backward": (
            1000,
            raises(RuntimeError, backward, upstream[1:], plain, *maps, *values, True, True, True),
        ),
        "double backward": (150, penalty),
        "torch.func.grad": (150, lambda: gradient(plain)),
        "torch.vmap": (150, lambda: per_sample(samples)),
    }


def left_behind(call: Callable[[], object], count: Callable[[], int], times: int = 20) -> int:
    """By how much ``count`` grows over so many calls, the first few left out."""
    for _ in range(3):
        call()
    before = count()
    for _ in range(times):
        call()
    return count() - before
