"""Our module with the weights of somebody else's."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import norm_of
from ..module import CBAM, Residual
from .structure import Structure, dense_shape


def is_ours(module: nn.Module) -> bool:
    """Whether ``module`` is what a conversion makes, and no subclass of it."""
    return type(module) is CBAM or (type(module) is Residual and is_ours(module.cbam))


def cbam_of(module: CBAM | Residual) -> CBAM:
    return module.cbam if isinstance(module, Residual) else module


def build(module: nn.Module, structure: Structure) -> CBAM | Residual:
    """Our module with the weights of ``module``, which it shares memory with where shapes allow."""
    layers = {ours: module.get_submodule(name) for ours, name in structure.layers().items()}
    # A spatial gate alone does not know its channels.
    hidden, channels = (dense_shape(layers["channel.fc1"]) if structure.fc1 else None) or (1, None)
    kernel = max(layers["spatial.conv"].weight.shape[2:]) if structure.conv else 1
    cbam = CBAM(
        channels,
        hidden_channels=hidden,
        kernel_size=kernel,
        mlp_bias=True,
        conv_bias=True,
        gates=structure.gates,
        device="meta",
    )
    for name, theirs in layers.items():
        if name == "spatial.norm":
            cbam.spatial.norm = plain_norm(theirs)
            continue
        ours, weight = cbam.get_submodule(name), theirs.weight.detach()
        is_conv = name == "spatial.conv"
        weight = translate_conv(weight, structure.swapped) if is_conv else weight.flatten(1)
        ours.weight = nn.Parameter(weight, theirs.weight.requires_grad)
        ours.bias = theirs.bias
    _copy_flags(module, cbam)
    if not structure.residual:
        return cbam
    residual = Residual(cbam)
    residual.training = module.training  # alone: a frozen norm stays frozen
    return residual


def translate_conv(weight: Tensor, swapped: bool) -> Tensor:
    """``[1, 2, k, k]`` with the average first, from ``[1, 2, h, w]`` in either order."""
    if swapped:
        weight = weight.flip(1)
    height, width = weight.shape[2:]
    k = max(height, width)
    if height == width:
        return weight
    square = weight.new_zeros(1, 2, k, k)
    top, left = (k - height) // 2, (k - width) // 2
    square[:, :, top : top + height, left : left + width] = weight
    return square


def plain_norm(norm: nn.Module) -> nn.Module:
    """``norm``, or a plain ``BatchNorm2d`` with its tensors in place of timm's subclass."""
    if not isinstance(norm, nn.BatchNorm2d) or type(norm).__name__ != "BatchNormAct2d":
        return norm
    plain = nn.BatchNorm2d(1, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(plain, name, getattr(norm, name))
    return plain.train(norm.training)


def _copy_flags(module: nn.Module, cbam: CBAM) -> None:
    for inner in cbam.modules():
        if inner is not norm_of(cbam.spatial):
            inner.training = module.training
