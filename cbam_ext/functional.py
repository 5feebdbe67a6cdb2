"""The public functions: kernels where there are some, the reference elsewhere."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _library, ops, reference
from ._checks import check_arguments

_warned: set[str] = set()


def cbam(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
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

    Each parameter is of the dtype of ``input`` or of its accumulator (float64 for float64, else
    float32), in which all sums and gates are kept.

    Returns:
        ``[N, C, H, W]`` of the dtype and layout of ``input``.

    A maximum that occurs more than once sends its gradient to the first place (lowest channel; row
    by row over H, W), as :func:`torch.max` with a dimension does; NaN propagates. Results are the
    same bits in every run.

    Raises:
        TypeError: an argument is no tensor or of a dtype that is not supported.
        ValueError: a shape or a device does not fit.

    Example:
        >>> x = torch.rand(2, 32, 8, 8)
        >>> y = cbam(x, torch.rand(2, 32), None, torch.rand(32, 2), None, torch.rand(1, 2, 7, 7))
        >>> y.shape
        torch.Size([2, 32, 8, 8])
    """
    arguments = (input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    if not use_kernels(input):
        if not isinstance(input, Tensor) and has_torch_function(arguments):  # a Proxy of torch.fx
            return handle_torch_function(cbam, arguments, *arguments)
        return reference.cbam(*arguments)
    try:
        return ops.cbam(*arguments)
    except RuntimeError:
        # Checking only after a failure keeps the checks off the path of every successful call.
        check_arguments(*arguments)
        raise


def gates(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two gates of :func:`cbam`, differentiable as well.

    Returns:
        Channel gate ``[N, C, 1, 1]`` and spatial gate ``[N, 1, H, W]``, values in [0, 1], in the
        accumulator dtype (float64 for float64 input, else float32).
    """
    arguments = (input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    if not use_kernels(input):
        check_arguments(*arguments)
        channel_gate = reference.channel_gate(*arguments[:5])
        logits = reference.spatial_logits(input, channel_gate, conv_weight, conv_bias)
        return channel_gate, torch.sigmoid(logits)
    try:
        return ops.gates(*arguments)
    except RuntimeError:
        check_arguments(*arguments)
        raise


def use_kernels(input: Tensor) -> bool:
    """Whether the kernels take ``input``; where they cannot, warns once per kind of device."""
    if not isinstance(input, Tensor) or not input.is_floating_point():
        return False  # the reference's checks explain
    device = input.device.type
    if ops.has_kernels(device):
        return True
    if device not in _warned and not torch.compiler.is_compiling():
        _warned.add(device)
        warnings.warn(
            f"{_library.no_kernel_reason(device)} Until then CBAM runs as plain PyTorch: "
            "the same results, but slower.",
            UserWarning,
            stacklevel=3,
        )
    return False
