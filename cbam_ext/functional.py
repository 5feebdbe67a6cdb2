"""The public functions: kernels where there are some, the reference elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from . import ops, reference
from .building import library
from .reference import check_arguments

T = TypeVar("T")

# What the parts below hand on for their backward; None: plain PyTorch from there on.
Carriers = ops.Carriers

_warned: set[str] = set()
_obstacles: dict[int, str] = {}  # by the index of a CUDA device, which is asked once


def cbam(
    input: Tensor,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """Convolutional Block Attention Module as one fused, differentiable operator.

    With ``ca`` the channel gate and ``sa`` the spatial gate (Woo et al., ECCV 2018,
    arXiv:1807.06521, equations 1 to 3)::

        ca = sigmoid(mlp(mean_hw(input)) + mlp(max_hw(input)))
        u  = ca * input
        sa = sigmoid(conv([mean_c(u), max_c(u)]))
        result = sa * u

    Args:
        input: ``[N, C, H, W]``, float64, float32, bfloat16 or float16. Contiguous and channels_last
            tensors are read in place and keep their layout; any other is copied once, on CUDA also
            one whose data does not begin at a multiple of 16 bytes.
        fc1_weight: ``[R, C]``, first layer of the MLP.
        fc1_bias: ``[R]`` or None.
        fc2_weight: ``[C, R]``, second layer of the MLP.
        fc2_bias: ``[C]`` or None. The MLP runs on both pooled vectors, so it counts twice.
        conv_weight: ``[1, 2, k, k]`` with ``k`` odd; channel 0 weighs the mean over the channels,
            channel 1 the maximum. The map is padded with ``k // 2`` zeros.
        conv_bias: ``[1]`` or None.

    With ``fc1_weight`` and ``fc2_weight`` None there is no channel gate, with ``conv_weight`` None
    no spatial gate: it is one everywhere, and what leads to it is left out.

    Each parameter is of the dtype of ``input`` or of its accumulator (float64 for float64, else
    float32), in which all sums and gates are kept.

    Returns:
        ``[N, C, H, W]`` of the dtype and layout of ``input``.

    A maximum that occurs more than once sends its gradient to the first place (lowest channel; row
    by row over H, W), as :func:`torch.max` with a dimension does; NaN propagates. Results are the
    same bits in every run.

    Raises:
        TypeError: an argument is no tensor or of a dtype that is not supported.
        ValueError: a shape or a device does not fit, or there is no gate at all.

    Example:
        >>> x = torch.rand(2, 32, 8, 8)
        >>> y = cbam(x, torch.rand(2, 32), None, torch.rand(32, 2), None, torch.rand(1, 2, 7, 7))
        >>> y.shape
        torch.Size([2, 32, 8, 8])
    """
    arguments = (input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    if not isinstance(input, Tensor) and has_torch_function(arguments):  # a Proxy of torch.fx
        return handle_torch_function(cbam, arguments, *arguments)
    return _run(ops.cbam, reference.cbam, arguments)


def gates(
    input: Tensor,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two gates of :func:`cbam`, differentiable as well.

    Returns:
        Channel gate ``[N, C, 1, 1]`` and spatial gate ``[N, 1, H, W]``, values in [0, 1], in the
        accumulator dtype (float64 for float64 input, else float32). One that is not there is one
        everywhere.
    """
    arguments = (input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    return _run(ops.gates, reference.gates, arguments)


# --------------------------------------------------------------------- parts, for the module alone


def spatial_logits(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor, Carriers]:
    """Channel gate, spatial logits and what :func:`apply_gates` wants for its backward."""
    return _run(ops.spatial_logits, _plain_spatial_logits, (input, *parameters))


def around_batch_norm(
    norm: nn.BatchNorm2d, input: Tensor, *parameters: Tensor | None
) -> Tensor | None:
    """:func:`cbam` around a norm that trains, in one; None where the norm has to be called."""
    return _run(partial(ops.around_batch_norm, norm), _no_output, (input, *parameters))


def pool(input: Tensor) -> tuple[Tensor, Carriers]:
    """Average and maximum over the pixels ``[N, 2, C]``, and carriers for the next."""
    return ops.pool(input) if use_kernels(input) else (reference.pool(input), None)


def channel_stats(
    input: Tensor, channel_gate: Tensor, carriers: Carriers
) -> tuple[Tensor, Carriers]:
    """Average and maximum over the channels of the refined map ``[N, 2, H, W]``, and carriers."""
    if carriers is None:
        return reference.channel_stats(input, channel_gate), None
    return ops.channel_stats(input, channel_gate, carriers)


def apply_gates(input: Tensor, channel_gate: Tensor, logits: Tensor, carriers: Carriers) -> Tensor:
    """``sigmoid(logits) * channel_gate * input``, in the dtype of ``input``.

    Carriers come from :func:`spatial_logits` or :func:`channel_stats`, None from plain PyTorch.
    """
    n, _, h, w = input.shape
    # In plain PyTorch logits of another shape may broadcast.
    if carriers is None or logits.shape != (n, 1, h, w):
        return reference.apply_gates(input, channel_gate, logits)
    return ops.apply_gates(input, channel_gate, logits, carriers)


def _plain_spatial_logits(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor, None]:
    check_arguments(input, *parameters)
    channel_gate = reference.channel_gate(input, *parameters[:4])
    return channel_gate, reference.spatial_logits(input, channel_gate, *parameters[4:]), None


def _no_output(*_: Tensor | None) -> None:
    return None


# --------------------------------------------------------------------------- kernels or reference


def _run(kernels: Callable[..., T], plain: Callable[..., T], arguments: Sequence[Any]) -> T:
    """Calls one of the two; errors are those of the reference's checks."""
    if not use_kernels(arguments[0]):
        return plain(*arguments)
    try:
        return kernels(*arguments)
    except RuntimeError:
        # Checking only after a failure keeps the checks off the path of every successful call.
        check_arguments(*arguments)
        raise


def use_kernels(input: Tensor) -> bool:
    """Whether the kernels take ``input``; where they cannot, warns once per kind of device."""
    if not isinstance(input, Tensor) or not input.is_floating_point():
        return False  # the reference's checks explain
    if ops.is_recorded() and torch.onnx.is_in_onnx_export():
        return False  # its exporters know PyTorch's own operators alone
    device = input.device
    if ops.has_kernels(device.type):
        # Compiled code calls the operator, which explains itself when it runs.
        if device.type != "cuda" or torch.compiler.is_compiling() or not _obstacle(device.index):
            return True
        name, reason = str(device), _obstacle(device.index)
    else:
        name, reason = device.type, ""
    if name not in _warned and not torch.compiler.is_compiling():
        _warned.add(name)
        warnings.warn(
            f"{reason or library.no_kernel_reason(name)} Until then CBAM runs as plain PyTorch: "
            "the same results, but slower.",
            UserWarning,
            stacklevel=4,  # the caller of the function that asks through _run()
        )
    return False


def _obstacle(index: int) -> str:
    """Why this GPU, or its driver, cannot run the CUDA kernels that are there; empty if it can."""
    if index not in _obstacles:
        _obstacles[index] = library.device_reason(index)
    return _obstacles[index]
