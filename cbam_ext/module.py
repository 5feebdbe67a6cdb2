"""The ``nn.Module`` around the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional, reference
from .building import library
from .layers import (
    ChannelGate,
    Init,
    Parameters,
    SpatialGate,
    are_of_one_mlp,
    are_plain,
    are_watched,
    call,
    channel_gate,
    first_logit,
    has_bias,
    has_hooks,
    has_own_forward,
    is_quickly_read,
    norm_of,
    open_channel_gate,
    open_spatial_gate,
    parameter,
    read_quickly,
    slides_as_built,
    spatial_logits,
    why_called,
    with_own_buffers,
)
from .reference import check_input

Gates = Literal["both", "channel", "spatial"]

_NO_MLP, _NO_CONVOLUTION = (None,) * 4, (None,) * 2


class CBAM(nn.Module):
    """Convolutional Block Attention Module (Woo et al., ECCV 2018, arXiv:1807.06521).

    Args:
        in_channels: channels ``C`` of the input. May be None for a spatial gate alone, which takes
            any number.
        reduction: the MLP has ``max(1, in_channels // reduction)`` hidden units.
        kernel_size: size of the spatial convolution, odd; the paper uses 7.
        hidden_channels: hidden units of the MLP, overriding ``reduction``.
        mlp_bias: biases in both layers of the MLP. ``None`` is False, or what ``init`` needs.
        conv_bias: a bias in the spatial convolution. ``None`` is False, or what ``init`` needs.
        norm_layer: a class or function called as ``norm_layer(1)``, whose module normalises the
            ``[N, 1, H, W]`` logits of the spatial gate. ``None`` is the paper's formula,
            ``torch.nn.BatchNorm2d`` the authors' code; a BatchNorm gets their momentum of 0.01.
        init: how the gates begin. "default": as the weights of PyTorch's layers have it, near 0.5
            each, so that a CBAM quarters its input. "identity": at sigmoid(5) = 0.993, so that it
            multiplies its input by 0.987; for a model that is trained already, and for many CBAMs
            one behind another, which quarter what the others have quartered. A number between 0
            and 1: at that. Open gates take biases (``mlp_bias``, and ``conv_bias`` where there is
            no norm, are switched on) and weights of zero in ``channel.fc2`` and ``spatial.conv``,
            or in ``spatial.norm`` where there is one. From the second step on everything learns, at
            0.993 with gradients a 38th of those at 0.5, which an optimiser such as Adam evens out.
        gates: "both", or one alone: "channel" (the authors' ``no_spatial``) or "spatial". Arguments
            of a gate that is not there have no effect.
        device, dtype: of the parameters.

    Shape:
        ``[N, C, H, W]`` to ``[N, C, H, W]``, of the same dtype and layout.

    The parameters are ``channel.fc1``, ``channel.fc2`` (``nn.Linear``) and ``spatial.conv``
    (``nn.Conv2d``), plus ``spatial.norm`` where a norm is asked for. A gate that is not there is
    None.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is not positive, ``kernel_size`` is even, ``gates`` is unknown, or what
            ``init`` sets is switched off.

    Example:
        >>> CBAM(64)(torch.rand(1, 64, 14, 14)).shape
        torch.Size([1, 64, 14, 14])
    """

    # What TorchScript asks for: constants by name, and properties that it is not to compile.
    __constants__ = ("_plain_in_script",)
    __jit_unused_properties__ = ("_plain_in_script", "gates")

    def __init__(
        self,
        in_channels: int | None,
        reduction: int = 16,
        kernel_size: int = 7,
        *,
        hidden_channels: int | None = None,
        mlp_bias: bool | None = None,
        conv_bias: bool | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        gates: Gates = "both",
        init: Init = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gates not in get_args(Gates):
            known = ", ".join(map(repr, get_args(Gates)))
            raise ValueError(f"gates must be one of {known}, got {gates!r}")
        if in_channels is None and gates == "spatial":
            hidden_channels = None
        else:
            _check_positive("in_channels", in_channels)
            _check_positive("reduction", reduction)
            if hidden_channels is None:
                hidden_channels = max(1, in_channels // reduction)
            _check_positive("hidden_channels", hidden_channels)
        _check_positive("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        logit = first_logit(init)

        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channel = self.spatial = None
        if gates != "spatial":
            bias = has_bias("mlp_bias", mlp_bias, init)
            self.channel = ChannelGate()
            self.channel.fc1 = nn.Linear(in_channels, hidden_channels, bias=bias, **factory)
            self.channel.fc2 = nn.Linear(hidden_channels, in_channels, bias=bias, **factory)
            open_channel_gate(self.channel, logit)
        if gates != "channel":
            # A norm has a bias of its own, which comes after this one.
            needed = init if norm_layer is None else "default"
            bias = has_bias("conv_bias", conv_bias, needed)
            self.spatial = SpatialGate()
            self.spatial.conv = nn.Conv2d(
                2, 1, kernel_size, padding=kernel_size // 2, bias=bias, **factory
            )
            self.spatial.norm = _make_norm(norm_layer, device, dtype)
            open_spatial_gate(self.spatial, logit)

    @property
    def gates(self) -> Gates:
        """Which gates there are: "both", "channel" or "spatial"."""
        if self.spatial is None:
            return "channel"
        return "spatial" if self.channel is None else "both"

    def forward(self, input: Tensor) -> Tensor:
        """The refined feature map, ``[N, C, H, W]``."""
        if torch.jit.is_scripting():
            return self._scripted(input)
        else:  # spelled out, because TorchScript would compile what follows a return
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return self._symbolic(input)
        # A compiler learns from the questions what to guard, a tracer takes sizes for tensors.
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            quick = self._read_quickly()
            if quick is not None:
                try:
                    return _fused(input, quick, norm_of(self._modules.get("spatial")))
                except (RuntimeError, TypeError, ValueError):
                    if are_plain(quick):
                        raise
        parameters = self._read_layers()
        if isinstance(parameters, str):
            return self._layer_by_layer(input)
        return _fused(input, parameters, norm_of(self.spatial))

    def _layer_by_layer(self, input: Tensor) -> Tensor:
        """``forward`` where a layer has to be called."""
        check_input(input)
        if self.gates != "both" or self._why_gates_are_called() is not None:
            refined = input.to(reference.accumulator_dtype(input.dtype))
            if self.channel is not None:
                refined = self.channel(input) * refined
            if self.spatial is not None:
                refined = self.spatial(refined) * refined
            return refined.to(input.dtype)
        channel_gate, logits, carriers = self._called_logits(input)
        return functional.apply_gates(input, channel_gate, logits, carriers)

    def _called_logits(self, input: Tensor) -> tuple[Tensor, Tensor, functional.Carriers]:
        """Channel gate and normalised logits of the spatial gate, from calls of all layers."""
        pooled, carriers = functional.pool(input)
        gate = channel_gate(self.channel, pooled)
        stats, carriers = functional.channel_stats(input, gate, carriers)
        return gate, spatial_logits(self.spatial, stats), carriers

    def _symbolic(self, input: torch.fx.Proxy) -> torch.fx.Proxy:
        """``forward`` for torch.fx: one node that calls this module, which keeps all that it has.

        Where this module is itself what is traced, one node of the function or those of the layers.
        """
        path_of_module = getattr(input.tracer, "path_of_module", None)
        name = "" if path_of_module is None else path_of_module(self)
        if name:
            return input.tracer.create_proxy("call_module", name, (input,), {})
        parameters = self._read_layers()
        if isinstance(parameters, str) or norm_of(self.spatial) is not None:
            return self._plain(input)
        return functional.cbam(input, *parameters)

    def _scripted(self, input: Tensor) -> Tensor:
        """``forward`` in the part of Python that TorchScript compiles."""
        if self._plain_in_script:
            return self._plain(input)
        w1: Tensor | None = None
        b1: Tensor | None = None
        w2: Tensor | None = None
        b2: Tensor | None = None
        if self.channel is not None:
            fc1, fc2 = self.channel.fc1, self.channel.fc2
            w1, b1, w2, b2 = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        if self.spatial is None:
            return torch.ops.cbam.forward(input, w1, b1, w2, b2, None, None)
        conv = self.spatial.conv
        if self.spatial.norm is None:
            return torch.ops.cbam.forward(input, w1, b1, w2, b2, conv.weight, conv.bias)
        channel_gate, logits = torch.ops.cbam._logits(input, w1, b1, w2, b2, conv.weight, conv.bias)
        # It cannot ask a norm for its dtype; a model is converted as a whole.
        logits = self.spatial.norm(logits.to(conv.weight.dtype)).to(logits.dtype)
        return torch.ops.cbam._apply(input, channel_gate, logits)

    def _plain(self, input: Tensor) -> Tensor:
        """``forward`` as the chain of layers in the dtype of the input."""
        refined = input
        if self.channel is not None:
            refined = refined * self.channel(refined)
        if self.spatial is not None:
            refined = refined * self.spatial(refined)
        return refined

    @property
    def _plain_in_script(self) -> bool:
        """A constant of the scripted module, so that one of the two ways is compiled."""
        return not library.is_loaded() or isinstance(self._read_layers(), str)

    def attention(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The two gates of ``forward(input)``, differentiable as that is.

        Leaves the module as it was: running statistics of a norm are not updated.

        Returns:
            Channel gate ``[N, C, 1, 1]`` and spatial gate ``[N, 1, H, W]``, values in [0, 1], in
            float32 (float64 for float64 input). One that is not there is one everywhere.
        """
        parameters = self._read_layers()
        if isinstance(parameters, str):
            check_input(input)
            return with_own_buffers(self)._called_gates(input)
        norm = norm_of(self.spatial)
        if norm is None:
            return functional.gates(input, *parameters)
        if _why_norm_is_called(norm) is None and not norm.training:
            return functional.gates(input, *_fold(norm, parameters))
        channel_gate, logits, _ = functional.spatial_logits(input, *parameters)
        return channel_gate, torch.sigmoid(call(with_own_buffers(norm), logits))

    def _called_gates(self, input: Tensor) -> tuple[Tensor, Tensor]:
        if self.gates != "both" or self._why_gates_are_called() is not None:
            n, c, h, w = input.shape
            refined = input.to(reference.accumulator_dtype(input.dtype))
            channel_gate, spatial_gate = refined.new_ones(n, c, 1, 1), refined.new_ones(n, 1, h, w)
            if self.channel is not None:
                channel_gate = self.channel(input)
                refined = channel_gate * refined
            if self.spatial is not None:
                spatial_gate = self.spatial(refined)
            return channel_gate, spatial_gate
        gate, logits, _ = self._called_logits(input)
        return gate, torch.sigmoid(logits)

    def why_not_fused(self) -> str | None:
        """Why this module is not one fused operator; None where it is, which is fastest.

        It is where each layer does exactly what its class says: an ``nn.Linear``, ``nn.Conv2d`` or
        ``nn.BatchNorm2d`` without hooks or a forward of its own, with the convolution's geometry as
        built and plain tensors for parameters; also under ``weight_norm`` and ``orthogonal`` of
        :mod:`torch.nn.utils.parametrizations`. Otherwise the layers are called, as a chain of
        PyTorch's modules calls them, and the kernels do what is around. A norm that is not an
        ``nn.BatchNorm2d`` is called between two fused halves.

        Example:
            >>> module = CBAM(64)
            >>> module.why_not_fused()
            >>> handle = module.channel.fc1.register_forward_hook(print)
            >>> module.why_not_fused()
            'layers are called: channel.fc1 has hooks'
        """
        parameters = self._read_layers()
        if isinstance(parameters, str):
            return f"layers are called: {parameters}"
        norm = norm_of(self.spatial)
        reason = None if norm is None else _why_norm_is_called(norm)
        return None if reason is None else f"the norm is called: spatial.norm {reason}"

    def extra_repr(self) -> str:
        parts = [f"in_channels={self.in_channels}"]
        if self.channel is not None:
            parts.append(f"hidden_channels={self.hidden_channels}")
        if self.spatial is not None:
            parts.append(f"kernel_size={self.kernel_size}")
        if self.gates != "both":
            parts.append(f"gates={self.gates!r}")
        reason = self.why_not_fused()
        return ", ".join(parts if reason is None else [*parts, reason])

    def _read_quickly(self) -> Parameters | None:
        """:meth:`_read_layers` for the usual case."""
        modules = self._modules
        channel, spatial = modules.get("channel"), modules.get("spatial")
        if (
            (type(channel) is ChannelGate or channel is None)
            and (type(spatial) is SpatialGate or spatial is None)
            and not are_watched()
        ):
            return read_quickly(channel, spatial)
        return None

    def _why_gates_are_called(self) -> str | None:
        """Why the gates are called as modules and not only looked into for their layers."""
        reason = _why_gate_is_called(self.channel, ChannelGate)
        if reason is not None:
            return f"channel {reason}"
        reason = _why_gate_is_called(self.spatial, SpatialGate)
        return None if reason is None else f"spatial {reason}"

    def _read_layers(self) -> Parameters | str:
        """Weights and biases of the layers, or why the layers have to be called instead."""
        if are_watched():
            return "all modules have hooks"
        reason = self._why_gates_are_called()
        if reason is not None:
            return reason
        mlp = _NO_MLP if self.channel is None else _read_mlp(self.channel)
        if isinstance(mlp, str):
            return f"channel.{mlp}"
        convolution = _NO_CONVOLUTION if self.spatial is None else _read_convolution(self.spatial)
        if isinstance(convolution, str):
            return f"spatial.{convolution}"
        parameters = mlp + convolution
        return parameters if are_plain(parameters) else "a parameter is no plain tensor"


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


def _fused(input: Tensor, parameters: Parameters, norm: Any) -> Tensor:
    """``CBAM.forward`` where no layer has to be called, but for a norm that may be."""
    if norm is None:
        return functional.cbam(input, *parameters)
    if _why_norm_is_called(norm) is None:
        if not norm.training:
            return functional.cbam(input, *_fold(norm, parameters))
        output = functional.around_batch_norm(norm, input, *parameters)
        if output is not None:
            return output
    channel_gate, logits, carriers = functional.spatial_logits(input, *parameters)
    return functional.apply_gates(input, channel_gate, call(norm, logits), carriers)


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


def _read_mlp(channel: nn.Module) -> Parameters | str:
    """Weights and biases of a channel gate, or which layer is called and why."""
    fc1, fc2 = channel.fc1, channel.fc2
    for name, layer in (("fc1", fc1), ("fc2", fc2)):
        reason = why_called(layer, nn.Linear)
        if reason is not None:
            return f"{name} {reason}"
    if not are_of_one_mlp(fc1, fc2):
        return "fc1 and channel.fc2 have other shapes"
    return tuple(parameter(layer, name) for layer in (fc1, fc2) for name in ("weight", "bias"))


def _read_convolution(spatial: nn.Module) -> Parameters | str:
    """Weight and bias of a spatial gate, or why its convolution is called."""
    conv = spatial.conv
    reason = why_called(conv, nn.Conv2d)
    if reason is not None:
        return f"conv {reason}"
    weight = parameter(conv, "weight")
    if not slides_as_built(conv, weight):
        return "conv has another geometry"
    return weight, parameter(conv, "bias")


def _why_gate_is_called(gate: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """Why ``gate`` is not exactly a ``kind``; one that is not there is not called."""
    if gate is None:
        return None
    if type(gate) is not kind:
        return f"is a {type(gate).__name__}"
    if has_hooks(gate):
        return "has hooks"
    return "has a forward of its own" if has_own_forward(gate) else None


def _why_norm_is_called(norm: nn.Module) -> str | None:
    """Why ``norm`` is no BatchNorm that nobody would miss if it were not called."""
    if not torch.compiler.is_compiling() and is_quickly_read(norm):
        return None
    # With the statistics of training behind it, SyncBatchNorm asks no other process.
    synchronised = type(norm) is nn.SyncBatchNorm and not norm.training
    reason = why_called(norm, nn.SyncBatchNorm if synchronised else nn.BatchNorm2d)
    if reason is not None:
        return reason
    mean, variance = norm.running_mean, norm.running_var
    if not norm.training and (mean is None or variance is None):
        return "has no running statistics"
    if not are_plain((norm.weight, norm.bias, mean, variance)):
        return "holds no plain tensors"
    return None


def _fold(norm: _BatchNorm, parameters: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The parameters, with a norm that scales and shifts folded into the convolution."""
    *mlp, weight, bias = parameters
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


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
