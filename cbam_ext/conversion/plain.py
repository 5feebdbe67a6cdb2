"""From ours to PyTorch's own layers, in a ``torch.fx.GraphModule``: :func:`to_plain`."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..layers import ChannelGate, SpatialGate, has_hooks, has_own_forward
from ..module import CBAM, Residual
from .graphs import graph_module, trace
from .translation import is_ours


def to_plain(
    model: nn.Module, inplace: bool = False, *, ties: Literal["first", "even"] = "first"
) -> nn.Module:
    """Replaces every :class:`cbam_ext.CBAM` by plain PyTorch, for people without this package.

    What comes out consists of PyTorch's layers in a ``torch.fx.GraphModule``, so that a pickle of
    it needs PyTorch alone, and has the names and values of the parameters that it had:
    ``state_dict`` files fit both ways. It computes in the dtype of its layers, as PyTorch's do.
    :func:`convert` leads back.

    Args:
        model: any module.
        inplace: change ``model`` itself instead of a copy.
        ties: where the gradient of equal maxima goes: to the "first", as in ours, or shared out
            evenly, as ``amax`` does, which is faster.

    Returns:
        The model, or the new module where ``model`` was a CBAM. Blocks that
        :func:`convert` rewrote, and the hooks of :func:`cbam_ext.smp.add_cbam`, still need this
        package.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or has a CBAM with hooks or of a subclass.
        ValueError: unknown ``ties``.

    Example:
        >>> print(to_plain(cbam_ext.CBAM(32), ties="even").code.strip())  # doctest: +ELLIPSIS
        def forward(self, input):
            ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_plain: model must be a torch.nn.Module, got {type(model).__name__}")
    if ties not in ("first", "even"):
        raise ValueError(f'to_plain: ties must be "first" or "even", got {ties!r}')
    if not inplace:
        model = copy.deepcopy(model)
    done: dict[nn.Module, nn.Module] = {}

    def plain(module: nn.Module) -> nn.Module:
        if module not in done:
            if isinstance(module, Residual) and not is_ours(module.cbam):
                module.cbam = replace(module.cbam)
            done[module] = _plain_module(module, ties)
        return done[module]

    def replace(module: nn.Module) -> nn.Module:
        if isinstance(module, CBAM | Residual):
            _check_plain(module)
            return plain(module)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = replace(child)
        return module

    return replace(model)


def _check_plain(module: nn.Module) -> None:
    if type(module) not in (CBAM, Residual):
        raise TypeError(f"to_plain: {type(module).__name__} is a subclass, with code of its own")
    # The layers stay as they are, with whatever was done to them.
    cbam = module.cbam if isinstance(module, Residual) else module
    gates = (cbam.channel, cbam.spatial) if isinstance(cbam, CBAM) else ()
    if any(map(has_hooks, (module, cbam, *gates))):
        raise TypeError("to_plain: a CBAM has hooks, which would be lost; remove them first")
    for gate, kind in zip(gates, (ChannelGate, SpatialGate), strict=False):
        if type(gate) is not kind or has_own_forward(gate):
            raise TypeError("to_plain: a gate of a CBAM was replaced; put it back first")


def _plain_module(module: CBAM | Residual, ties: str) -> fx.GraphModule:
    """A module with the submodules of ``module`` that pickles without this package."""
    if isinstance(module, Residual):
        inner = _plain_module(module.cbam, ties) if is_ours(module.cbam) else module.cbam
        root = _PlainResidual(inner)
    else:
        root = _PlainCBAM(module, ties)
    root.training = module.training
    return graph_module(root, trace(root), "PlainCBAM")


class _PlainCBAM(nn.Module):
    """What is traced."""

    def __init__(self, cbam: CBAM, ties: str) -> None:
        super().__init__()
        self.channel, self.spatial, self.ties = cbam.channel, cbam.spatial, ties

    def forward(self, input: Tensor) -> Tensor:
        pixels = input.flatten(2)
        fc1, fc2 = self.channel.fc1, self.channel.fc2
        logits = fc2(F.relu(fc1(pixels.mean(2)))) + fc2(F.relu(fc1(self.maximum(pixels, 2))))
        refined = input * torch.sigmoid(logits).unsqueeze(2).unsqueeze(3)
        average, maximum = refined.mean(1), self.maximum(refined, 1)
        logits = self.spatial.conv(torch.stack([average, maximum], 1))
        if self.spatial.norm is not None:
            logits = self.spatial.norm(logits)
        return refined * torch.sigmoid(logits)

    def maximum(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.max(dim)[0] if self.ties == "first" else tensor.amax(dim)


class _PlainResidual(nn.Module):
    def __init__(self, cbam: nn.Module) -> None:
        super().__init__()
        self.cbam = cbam

    def forward(self, input: Tensor) -> Tensor:
        return input + self.cbam(input)
