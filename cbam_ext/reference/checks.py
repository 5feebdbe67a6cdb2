"""Argument checks of the public functions, in words that say what to change.

The compiled operators check the same things (csrc/torch/checks.cpp) for people who call
``torch.ops.cbam``; there every failure is a RuntimeError, here it is a TypeError or a ValueError
with the same words.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .._text import name_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 2**31 - 1  # kernels keep the channel of a maximum in 32 bits

P = ParamSpec("P")
T = TypeVar("T")


def untraced(question: Callable[P, T]) -> Callable[P, T]:
    """Keeps a tracer from warning of ``question``, which reads sizes that the graph is free of.

    To ``torch.jit.trace`` sizes are tensors, and a comparison of them a branch that it loses.
    """

    @functools.wraps(question)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.jit.is_tracing():
            return question(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return question(*args, **kwargs)

    return wrapped


@untraced
def check_arguments(
    input: Tensor,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
) -> None:
    """Raises TypeError or ValueError that names the argument, what was expected and what came."""
    check_input(input)
    channels = input.shape[1]

    parameters = {
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
    }
    for name, parameter in parameters.items():
        if parameter is not None:
            _check_parameter(name, parameter, input)

    _check_gates(**parameters)
    if fc1_weight is not None:
        if fc1_weight.dim() != 2 or fc1_weight.shape[0] == 0 or fc1_weight.shape[1] != channels:
            raise ValueError(
                f"fc1_weight must have shape [R, {channels}] (R >= 1, and the {channels} channels "
                f"of input), got {_shape(fc1_weight)}"
            )
        hidden = fc1_weight.shape[0]
        _check_shape("fc1_bias", fc1_bias, [hidden])
        _check_shape("fc2_weight", fc2_weight, [channels, hidden])
        _check_shape("fc2_bias", fc2_bias, [channels])
    if conv_weight is not None:
        if (
            conv_weight.dim() != 4
            or conv_weight.shape[0] != 1
            or conv_weight.shape[1] != 2
            or conv_weight.shape[2] != conv_weight.shape[3]
            or conv_weight.shape[2] % 2 == 0
        ):
            raise ValueError(
                f"conv_weight must have shape [1, 2, k, k] with k odd, got {_shape(conv_weight)}"
            )
        _check_shape("conv_bias", conv_bias, [1])


@untraced
def check_input(input: Tensor) -> None:
    """What :func:`check_arguments` says of the feature map."""
    _check_tensor("input", input)
    if input.dtype not in DTYPES:
        raise TypeError(
            f"input must be float64, float32, bfloat16 or float16, got {name_of(input.dtype)}"
        )
    if input.dim() != 4:
        raise ValueError(f"input must have 4 dimensions [N, C, H, W], got {_shape(input)}")
    _, channels, height, width = input.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"input must have C, H and W of at least 1, got {_shape(input)}")
    if channels > MAX_CHANNELS:
        raise ValueError(f"input must have at most {MAX_CHANNELS} channels, got {_shape(input)}")


def _check_gates(
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
) -> None:
    """Which gates there are: one of them at least, and of each all weights or none."""
    if (fc1_weight is None) != (fc2_weight is None):
        raise ValueError(
            "fc1_weight and fc2_weight must be given together, or both be None for no channel gate"
        )
    if fc1_weight is None and not (fc1_bias is None and fc2_bias is None):
        raise ValueError("fc1_bias and fc2_bias must be None where fc1_weight and fc2_weight are")
    if conv_weight is None and conv_bias is not None:
        raise ValueError("conv_bias must be None where conv_weight is")
    if fc1_weight is None and conv_weight is None:
        raise ValueError(
            "weights of at least one gate must be given: fc1_weight and fc2_weight of the channel "
            "gate, conv_weight of the spatial gate"
        )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got {value.layout}")


def _check_parameter(name: str, parameter: object, input: Tensor) -> None:
    _check_tensor(name, parameter)
    assert isinstance(parameter, Tensor)
    accumulator = torch.float64 if input.dtype == torch.float64 else torch.float32
    if parameter.dtype not in (input.dtype, accumulator):
        allowed = " or ".join(dict.fromkeys((name_of(accumulator), name_of(input.dtype))))
        raise TypeError(
            f"{name} must be {allowed} for an input of {name_of(input.dtype)}, "
            f"got {name_of(parameter.dtype)}"
        )
    if parameter.device != input.device:
        raise ValueError(
            f"{name} must be on the device of input, {input.device}, got {parameter.device}"
        )


def _check_shape(name: str, parameter: Tensor | None, shape: list[int]) -> None:
    if parameter is not None and list(parameter.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {_shape(parameter)}")


def _shape(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"
