"""What people do to the layers of a CBAM, and how ours has to follow the chain (chains.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import cbam_ext

from .chains import assert_alike, chain_of, draw_cbam, step
from .samples import draw_like

LAYERS = ("channel.fc1", "channel.fc2", "spatial.conv")
NORMS = [None, nn.BatchNorm2d, lambda c: nn.GroupNorm(1, c)]
NORM_IDS = ["no norm", "BatchNorm2d", "GroupNorm"]

Treatment = Callable[[nn.Module, str], None]


def layer_of(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name)


def put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def forward_hook(module: nn.Module, name: str) -> None:
    layer_of(module, name).register_forward_hook(lambda _, args, output: 2 * output)


def forward_pre_hook(module: nn.Module, name: str) -> None:
    layer_of(module, name).register_forward_pre_hook(lambda _, args: (args[0] / 2,))


def full_backward_hook(module: nn.Module, name: str) -> None:
    hook = lambda _, grads, __: tuple(g if g is None else 3 * g for g in grads)  # noqa: E731
    layer_of(module, name).register_full_backward_hook(hook)


def full_backward_pre_hook(module: nn.Module, name: str) -> None:
    layer_of(module, name).register_full_backward_pre_hook(lambda _, grads: (3 * grads[0],))


def own_forward(module: nn.Module, name: str) -> None:
    layer = layer_of(module, name)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def inner_forward(module: nn.Module, name: str) -> None:
    """The conv's alone; others are left with a hook."""
    layer = layer_of(module, name)
    if not isinstance(layer, nn.Conv2d):
        return forward_hook(module, name)
    layer._conv_forward = lambda *a, inner=layer._conv_forward: 2 * inner(*a)


def another_layer(module: nn.Module, name: str) -> None:
    put(module, name, nn.Sequential(layer_of(module, name), nn.Tanh()))


class TwiceLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class TwiceConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def subclass(module: nn.Module, name: str) -> None:
    layer = layer_of(module, name)
    layer.__class__ = TwiceLinear if isinstance(layer, nn.Linear) else TwiceConv2d


class Counting(nn.Module):
    """A parametrization that tells how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return weight * float(self.count)


def counting_parametrization(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(layer_of(module, name), "weight", Counting())


class Doubling(Tensor):
    """As quantised tensors do: what a layer computes with it is up to the tensor."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (nn.functional.linear, nn.functional.conv2d):
            return 2 * result.as_subclass(Tensor)
        return result


def tensor_with_a_mind(module: nn.Module, name: str) -> None:
    layer = layer_of(module, name)
    held = layer.weight.detach().clone().as_subclass(Doubling)
    layer.weight = nn.Parameter(held)


def compiled_by_itself(module: nn.Module, name: str) -> None:
    layer = layer_of(module, name)
    layer._compiled_call_impl = lambda x, call=layer._call_impl: 2 * call(x)


TREATMENTS: list[Treatment] = [
    forward_hook,
    forward_pre_hook,
    full_backward_hook,
    full_backward_pre_hook,
    own_forward,
    inner_forward,
    another_layer,
    subclass,
    counting_parametrization,
    tensor_with_a_mind,
    compiled_by_itself,
]


def wrapped_around(conv: nn.Conv2d) -> None:
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def reflected(conv: nn.Conv2d) -> None:
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def dilated(conv: nn.Conv2d) -> None:
    conv.dilation = conv.padding = (2, 2)


def padded_by_name(conv: nn.Conv2d) -> None:
    conv.padding, conv.dilation = "same", (2, 2)


def flat(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach()[:, :, 1:2].clone())
    conv.padding = (0, 1)


GEOMETRIES = [wrapped_around, reflected, dilated, padded_by_name, flat]


def assert_follows(
    treat: Callable[[nn.Module], Any],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    training: bool = True,
    norm_layer: Any = None,
    layout: torch.memory_format = torch.contiguous_format,
    limit: float = 1e-10,
    steps: int = 2,
) -> cbam_ext.CBAM:
    """Ours and the chain, treated alike, agree over some steps."""
    module = draw_cbam(norm_layer=norm_layer, conv_bias=True).to(dtype).train(training)
    chain = chain_of(module)
    for each in (module, chain):
        treat(each)
    for _ in range(steps):
        x = torch.randn(3, 8, 7, 6, generator=generator).to(dtype).contiguous(memory_format=layout)
        upstream = draw_like(x, generator)
        found, expected = step(module, x, upstream), step(chain, x, upstream)
        assert_alike(found, expected, limit)
        assert found["output"].is_contiguous(memory_format=layout)
        assert found["input"].is_contiguous(memory_format=layout)
    assert module.state_dict().keys() == chain.state_dict().keys()
    with torch.no_grad():
        assert_alike({"output": module(x)}, {"output": chain(x)}, limit)
    return module
