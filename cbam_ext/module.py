"""The ``nn.Module`` around the operator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional, ops, reference
from ._checks import check_arguments


class CBAM(nn.Module):
    """Convolutional Block Attention Module (Woo et al., ECCV 2018, arXiv:1807.06521).

    Args:
        in_channels: channels ``C`` of the input.
        reduction: the MLP has ``max(1, in_channels // reduction)`` hidden units.
        kernel_size: size of the spatial convolution, odd; the paper uses 7.
        hidden_channels: hidden units of the MLP, overriding ``reduction``.
        mlp_bias: biases in both layers of the MLP.
        conv_bias: a bias in the spatial convolution.
        norm_layer: a class or function called as ``norm_layer(1)``, whose module normalises the
            ``[N, 1, H, W]`` logits of the spatial gate. ``None`` is the paper's formula,
            ``torch.nn.BatchNorm2d`` the authors' code; a BatchNorm gets their momentum of 0.01.
        device, dtype: of the parameters.

    Shape:
        ``[N, C, H, W]`` to ``[N, C, H, W]``, of the same dtype and layout.

    The parameters are ``channel.fc1``, ``channel.fc2`` (``nn.Linear``) and ``spatial.conv``
    (``nn.Conv2d``), initialised as those are, plus ``spatial.norm`` where a norm is asked for.

    Example:
        >>> CBAM(64)(torch.rand(1, 64, 14, 14)).shape
        torch.Size([1, 64, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        *,
        hidden_channels: int | None = None,
        mlp_bias: bool = False,
        conv_bias: bool = False,
        norm_layer: Callable[[int], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive("in_channels", in_channels)
        _check_positive("reduction", reduction)
        _check_positive("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if hidden_channels is None:
            hidden_channels = max(1, in_channels // reduction)
        _check_positive("hidden_channels", hidden_channels)

        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channel = nn.Module()
        self.channel.fc1 = nn.Linear(in_channels, hidden_channels, bias=mlp_bias, **factory)
        self.channel.fc2 = nn.Linear(hidden_channels, in_channels, bias=mlp_bias, **factory)
        self.spatial = nn.Module()
        self.spatial.conv = nn.Conv2d(
            2, 1, kernel_size, padding=kernel_size // 2, bias=conv_bias, **factory
        )
        self.spatial.norm = _make_norm(norm_layer, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The refined feature map, ``[N, C, H, W]``."""
        if torch.jit.is_scripting():
            return self._scripted(input)
        else:  # spelled out, because TorchScript would compile what follows a return
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        norm = _submodule(_submodule(self, "spatial"), "norm")
        if norm is None:
            return functional.cbam(input, *self._parameters_of_op())
        if _folds(norm):
            return functional.cbam(input, *self._folded_parameters(norm))
        if _trains_unseen(norm) and functional.use_kernels(input):
            try:
                output = ops.around_batch_norm(norm, input, *self._parameters_of_op())
            except RuntimeError:
                check_arguments(input, *self._parameters_of_op())
                raise
            if output is not None:
                return output
        channel_gate, logits, carriers = self._logits(input)
        return _apply_gates(input, channel_gate, _normalise(norm, logits), carriers)

    def _scripted(self, input: Tensor) -> Tensor:
        """``forward`` in the part of Python that TorchScript compiles."""
        fc1, fc2, conv = self.channel.fc1, self.channel.fc2, self.spatial.conv
        if self.spatial.norm is None:
            return torch.ops.cbam.forward(
                input, fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias
            )
        channel_gate, logits = torch.ops.cbam._logits(
            input, fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias
        )
        # It cannot ask a norm for its dtype; a model is converted as a whole.
        logits = self.spatial.norm(logits.to(conv.weight.dtype)).to(logits.dtype)
        return torch.ops.cbam._apply(input, channel_gate, logits)

    @torch.no_grad()
    def attention(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The two gates of ``forward(input)``, for looking at: not differentiable.

        Leaves the module as it was: running statistics of a norm are not updated.

        Returns:
            Channel gate ``[N, C, 1, 1]`` and spatial gate ``[N, 1, H, W]``, values in [0, 1], in
            float32 (float64 for float64 input).
        """
        norm = _submodule(_submodule(self, "spatial"), "norm")
        if norm is None:
            return functional.gates(input, *self._parameters_of_op())
        if _folds(norm):
            return functional.gates(input, *self._folded_parameters(norm))
        channel_gate, logits, _ = self._logits(input)
        return channel_gate, torch.sigmoid(_normalise(copy.deepcopy(norm), logits))

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, hidden_channels={self.hidden_channels}, "
            f"kernel_size={self.kernel_size}"
        )

    def _parameters_of_op(self) -> tuple[Tensor | None, ...]:
        channel, spatial = _submodule(self, "channel"), _submodule(self, "spatial")
        fc1, fc2 = _submodule(channel, "fc1"), _submodule(channel, "fc2")
        layers = (fc1, fc2, _submodule(spatial, "conv"))
        return tuple(_parameter(layer, name) for layer in layers for name in ("weight", "bias"))

    def _folded_parameters(self, norm: _BatchNorm) -> tuple[Tensor | None, ...]:
        """The parameters, with a norm that scales and shifts folded into the convolution."""
        *mlp, weight, bias = self._parameters_of_op()
        assert weight is not None and norm.running_mean is not None
        assert norm.running_var is not None
        # Folding in the accumulator dtype costs half models no accuracy: the operator takes
        # parameters of that dtype beside half input.
        dtype = reference.accumulator_dtype(weight.dtype)
        scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.to(dtype)
        shift = -norm.running_mean.to(dtype) * scale
        if bias is not None:
            shift = shift + bias.to(dtype) * scale
        if norm.bias is not None:
            shift = shift + norm.bias.to(dtype)
        return *mlp, weight.to(dtype) * scale, shift

    def _logits(self, input: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Channel gate, spatial logits and what ties the two phases together in backward."""
        arguments = (input, *self._parameters_of_op())
        if functional.use_kernels(input):
            try:
                return ops.spatial_logits(*arguments)
            except RuntimeError:
                check_arguments(*arguments)
                raise
        check_arguments(*arguments)
        channel_gate = reference.channel_gate(*arguments[:5])
        logits = reference.spatial_logits(input, channel_gate, *arguments[5:])
        return channel_gate, logits, None


class Residual(nn.Module):
    """``input + cbam(input)``, as some implementations of CBAM do by themselves.

    Args:
        cbam: the module whose output is added to its input.

    Shape:
        ``[N, C, H, W]`` to ``[N, C, H, W]``.

    Example:
        >>> Residual(CBAM(64))(torch.rand(1, 64, 14, 14)).shape
        torch.Size([1, 64, 14, 14])
    """

    def __init__(self, cbam: nn.Module) -> None:
        super().__init__()
        self.cbam = cbam

    def forward(self, input: Tensor) -> Tensor:
        return input + self.cbam(input)


# nn.Module finds parameters and submodules after all else, at two microseconds each. So these look
# first where they are held; they may be elsewhere, as a weight is that is parametrized.


def _submodule(module: nn.Module, name: str) -> Any:
    if name in module._modules:
        return module._modules[name]
    return getattr(module, name)


def _parameter(layer: nn.Module, name: str) -> Any:
    if name in layer._parameters:
        return layer._parameters[name]
    return getattr(layer, name)


def _apply_gates(
    input: Tensor, channel_gate: Tensor, logits: Tensor, carriers: tuple[Tensor, Tensor] | None
) -> Tensor:
    if carriers is None:
        return reference.apply_gates(input, channel_gate, logits)
    return ops.apply_gates(input, channel_gate, logits, carriers)


def _make_norm(
    norm_layer: Callable[[int], nn.Module] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module | None:
    if norm_layer is None:
        return None
    norm = norm_layer(1)
    if not isinstance(norm, nn.Module):
        raise TypeError(f"norm_layer(1) must return a torch.nn.Module, got {type(norm).__name__}")
    if isinstance(norm, _BatchNorm):
        norm.momentum = 0.01  # the authors' code
    return norm.to(device=device, dtype=dtype)


def _folds(norm: nn.Module) -> bool:
    """Whether ``norm`` is a BatchNorm that scales and shifts by constants at present.

    With hooks it is called as any module, in case they bring its parameters (FSDP's do) or look.
    """
    return (
        isinstance(norm, _BatchNorm)
        and not norm.training
        and not _is_hooked(norm)
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def _trains_unseen(norm: nn.Module) -> bool:
    """Whether ``norm`` is a plain BatchNorm in training, which nobody would miss if not called."""
    return type(norm) is nn.BatchNorm2d and norm.training and not _is_hooked(norm)


def _is_hooked(norm: nn.Module) -> bool:
    return bool(
        norm._forward_pre_hooks
        or norm._forward_hooks
        or norm._backward_pre_hooks
        or norm._backward_hooks
    )


def _normalise(norm: nn.Module, logits: Tensor) -> Tensor:
    """``norm(logits)``, computed in the dtype of the norm's own parameters or statistics."""
    # Its own come first among parameters() as well, but walking a module's tree takes its time.
    held = chain(norm._parameters.values(), norm.parameters(), norm.buffers())
    dtypes = (tensor.dtype for tensor in held if tensor is not None)
    dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), logits.dtype)
    return norm(logits.to(dtype)).to(logits.dtype)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
