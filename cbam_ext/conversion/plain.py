"""From ours to PyTorch's own layers, in torch.fx.GraphModules: :func:`to_plain`."""

from __future__ import annotations

from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..layers import ChannelGate, SpatialGate, has_hooks, has_own_forward, norm_of
from ..module import CBAM, Residual
from ..placement import Placed
from .copies import copy_of
from .portable import hand_over, portable, portable_function
from .rewriting import Rewritten


def to_plain(
    model: nn.Module, inplace: bool = False, *, ties: Literal["first", "even"] = "first"
) -> nn.Module:
    """Replaces every :class:`cbam_ext.CBAM` by plain PyTorch, for people without this package.

    What comes out needs PyTorch alone, copied and pickled as well, and has the names, values and
    order of the parameters that it had: ``state_dict`` files fit both ways. A CBAM becomes an
    ``nn.Sequential`` of its gates, each a ``torch.fx.GraphModule`` around the layers as they
    are, whatever was done to these. Attributes and hooks of a module go over. It computes in the
    dtype of its layers, as PyTorch's do. :func:`convert` leads back.

    A block whose forward :func:`convert` wrote, and a :class:`cbam_ext.Residual`, become
    GraphModules, without the methods of their class; the hooks of :func:`add_cbam` become such
    too, which ``torch.jit.script`` does not take (script the model itself).

    Args:
        model: any module.
        inplace: change ``model`` itself instead of a copy.
        ties: where the gradient of equal maxima goes: to the "first", as in ours, or shared out
            evenly, as ``amax`` does, which is faster.

    Returns:
        The model, or the new module where ``model`` was itself replaced.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or has a CBAM of a subclass, one whose forward was
            patched, or gates that were replaced, patched or hooked; or what becomes a GraphModule
            has hooks, which those lose when they are copied.
        ValueError: unknown ``ties``.
        RuntimeError: the model cannot be copied.

    Example:
        >>> plain = to_plain(cbam_ext.CBAM(32), ties="even")
        >>> print(plain.spatial.code.strip())  # doctest: +ELLIPSIS
        def forward(self, input):
            ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_plain: model must be a torch.nn.Module, got {type(model).__name__}")
    if ties not in ("first", "even"):
        raise ValueError(f'to_plain: ties must be "first" or "even", got {ties!r}')
    if not inplace:
        model = copy_of(model, "to_plain")
    for module in model.modules():
        _check(module)
    done: dict[nn.Module, nn.Module] = {}  # so that shared modules stay shared

    def replace(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = _plain_cbam(module, ties) if isinstance(module, CBAM) else inside(module)
        return done[module]

    def inside(module: nn.Module) -> nn.Module:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = replace(child)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in hooks.items():
                if _is_of_this_package(hook):
                    hooks[number] = portable_function(getattr(hook, "_by_graph", hook))
        placed = Placed.on(module)
        if placed is not None:
            placed.is_plain = True
        return portable(module) if _is_of_this_package(type(module)) else module

    return replace(model)


def is_plain_cbam(module: nn.Module) -> bool:
    """Whether ``module`` is what :func:`to_plain` makes of a CBAM."""
    return (
        type(module) is nn.Sequential
        and [*module._modules] in (["channel", "spatial"], ["channel"], ["spatial"])
        and all(isinstance(gate, fx.GraphModule) for gate in module)
    )


def _is_of_this_package(thing: Any) -> bool:
    """Whether a pickle of this class or function would ask for this package."""
    if isinstance(thing, type) and issubclass(thing, Rewritten):
        return True
    module = getattr(thing, "__module__", None) or ""
    return module.partition(".")[0] == __name__.partition(".")[0]


def _check(module: nn.Module) -> None:
    """Raises where something would be lost. The layers stay as they are."""
    kind = type(module)
    if isinstance(module, CBAM | Residual) and kind not in (CBAM, Residual):
        raise TypeError(f"to_plain: {kind.__name__} is a subclass, with code of its own")
    if not _is_of_this_package(kind):
        return
    if has_own_forward(module):
        raise TypeError(
            f"to_plain: a {kind.__name__} was compiled by itself, or given another forward as by "
            "accelerate; undo that first"
        )
    if kind is not CBAM and has_hooks(module):
        # Copies of a GraphModule drop them, and those of a gate would not see the gate.
        raise TypeError(
            f"to_plain: a {kind.__name__} has hooks, which would be lost; remove them first"
        )
    if kind is CBAM and not (
        type(module.channel) in (ChannelGate, NoneType)
        and type(module.spatial) in (SpatialGate, NoneType)
    ):
        raise TypeError("to_plain: a gate of a CBAM was replaced; put it back first")


def _plain_cbam(cbam: CBAM, ties: str) -> nn.Sequential:
    """A module with the layers of ``cbam`` and all that it has."""
    plain = nn.Sequential()
    for name, kind in (("channel", PlainChannelGate), ("spatial", PlainSpatialGate)):
        gate = getattr(cbam, name)
        if gate is None:
            continue
        plain.add_module(name, portable(kind(gate, ties), instead_of=gate))
    hand_over(cbam, plain)
    return plain


class _PlainGate(nn.Module):
    """What is traced: from a map to the map times its gate."""

    def __init__(self, gate: nn.Module, ties: str) -> None:
        super().__init__()
        self._modules.update(gate._modules)
        self.ties = ties

    def maximum(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.max(dim)[0] if self.ties == "first" else tensor.amax(dim)


class PlainChannelGate(_PlainGate):
    def forward(self, input: Tensor) -> Tensor:
        pixels, fc1, fc2 = input.flatten(2), self.fc1, self.fc2
        logits = fc2(F.relu(fc1(pixels.mean(2)))) + fc2(F.relu(fc1(self.maximum(pixels, 2))))
        return input * torch.sigmoid(logits).unsqueeze(2).unsqueeze(3)


class PlainSpatialGate(_PlainGate):
    def forward(self, input: Tensor) -> Tensor:
        logits = self.conv(torch.stack([input.mean(1), self.maximum(input, 1)], 1))
        if norm_of(self) is not None:
            logits = self.norm(logits)
        return input * torch.sigmoid(logits)
