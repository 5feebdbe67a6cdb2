"""Bad arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cbam_ext

from support import operators
from support.backends import Backend
from support.samples import NAMES, Problem, draw


def good(device: torch.device | str = "cpu") -> dict[str, Any]:
    """A valid call: 2 samples, 6 channels, 3 hidden units, a kernel of 5."""
    call = {
        "input": torch.randn(2, 6, 4, 5),
        "fc1_weight": torch.randn(3, 6),
        "fc1_bias": torch.randn(3),
        "fc2_weight": torch.randn(6, 3),
        "fc2_bias": torch.randn(6),
        "conv_weight": torch.randn(1, 2, 5, 5),
        "conv_bias": torch.randn(1),
    }
    return {name: value.to(device) for name, value in call.items()}


class Bad(NamedTuple):
    """One changed argument, and the words that the error must contain."""

    argument: str
    value: Tensor
    error: type[Exception]
    words: tuple[str, ...]


def _bad(argument: str, value: Tensor, error: type[Exception], *words: str) -> Bad:
    return Bad(argument, value, error, words)


R = torch.randn
BAD = [
    # ranks and empty dimensions of the input
    _bad("input", R(6, 4, 5), ValueError, "4 dimensions", "[6, 4, 5]"),
    _bad("input", R(1, 2, 6, 4, 5), ValueError, "4 dimensions", "[1, 2, 6, 4, 5]"),
    _bad("input", R(()), ValueError, "4 dimensions", "[]"),
    _bad("input", R(2, 0, 4, 5), ValueError, "at least 1", "[2, 0, 4, 5]"),
    _bad("input", R(2, 6, 0, 5), ValueError, "at least 1", "[2, 6, 0, 5]"),
    _bad("input", R(2, 6, 4, 0), ValueError, "at least 1", "[2, 6, 4, 0]"),
    _bad("input", R(0, 6, 4, 0), ValueError, "at least 1", "[0, 6, 4, 0]"),
    # dtypes
    _bad("input", torch.zeros(2, 6, 4, 5, dtype=torch.int32), TypeError, "float32", "int32"),
    _bad("input", torch.zeros(2, 6, 4, 5, dtype=torch.bool), TypeError, "float32", "bool"),
    _bad(
        "input", torch.zeros(2, 6, 4, 5, dtype=torch.complex64), TypeError, "float32", "complex64"
    ),
    *(
        _bad(name, good()[name].to(dtype), TypeError, "float32", str(dtype).split(".")[1])
        for name in NAMES[1:]
        for dtype in (torch.float64, torch.bfloat16, torch.int64)
    ),
    # shapes of the parameters
    _bad("fc1_weight", R(3, 7), ValueError, "[R, 6]", "[3, 7]"),
    _bad("fc1_weight", R(6), ValueError, "[R, 6]", "[6]"),
    _bad("fc1_weight", R(3, 6, 1, 1), ValueError, "[R, 6]", "[3, 6, 1, 1]"),
    _bad("fc1_weight", R(0, 6), ValueError, "R >= 1", "[0, 6]"),
    _bad("fc1_bias", R(6), ValueError, "[3]", "[6]"),
    _bad("fc1_bias", R(3, 1), ValueError, "[3]", "[3, 1]"),
    _bad("fc2_weight", R(3, 6), ValueError, "[6, 3]", "[3, 6]"),
    _bad("fc2_weight", R(6, 4), ValueError, "[6, 3]", "[6, 4]"),
    _bad("fc2_weight", R(6, 3, 1, 1), ValueError, "[6, 3]", "[6, 3, 1, 1]"),
    _bad("fc2_bias", R(3), ValueError, "[6]", "[3]"),
    _bad("fc2_bias", R(1, 6), ValueError, "[6]", "[1, 6]"),
    _bad("conv_weight", R(1, 2, 4, 4), ValueError, "[1, 2, k, k]", "odd", "[1, 2, 4, 4]"),
    _bad("conv_weight", R(1, 2, 0, 0), ValueError, "[1, 2, k, k]", "odd", "[1, 2, 0, 0]"),
    _bad("conv_weight", R(1, 2, 3, 5), ValueError, "[1, 2, k, k]", "[1, 2, 3, 5]"),
    _bad("conv_weight", R(1, 1, 5, 5), ValueError, "[1, 2, k, k]", "[1, 1, 5, 5]"),
    _bad("conv_weight", R(2, 2, 5, 5), ValueError, "[1, 2, k, k]", "[2, 2, 5, 5]"),
    _bad("conv_weight", R(2, 5, 5), ValueError, "[1, 2, k, k]", "[2, 5, 5]"),
    _bad("conv_bias", R(2), ValueError, "[1]", "[2]"),
    _bad("conv_bias", R(()), ValueError, "[1]", "[]"),
]
IDS = [f"{b.argument} {b.value.dtype} {list(b.value.shape)}".replace("torch.", "") for b in BAD]


def _match(bad: Bad) -> str:
    """The message names the argument, then says the words, in this order."""
    return ".*".join(re.escape(word) for word in (bad.argument, *bad.words))


@pytest.mark.parametrize("bad", BAD, ids=IDS)
def test_function(bad: Bad) -> None:
    call = good() | {bad.argument: bad.value}
    for function in (cbam_ext.cbam, cbam_ext.reference.cbam):
        with pytest.raises(bad.error, match=_match(bad)):
            function(**call)


@pytest.mark.parametrize("name", ["forward", "gates", "_forward_train", "_logits"])
@pytest.mark.parametrize("bad", BAD, ids=IDS)
def test_operator(backend: Backend, name: str, bad: Bad) -> None:
    call = good(backend.device) | {bad.argument: bad.value.to(backend.device)}
    with pytest.raises(RuntimeError, match=_match(bad)):
        getattr(backend.ops, name)(*call.values())


@pytest.mark.parametrize("bad", BAD, ids=IDS)
def test_operator_where_a_gradient_is_wanted(backend: Backend, bad: Bad) -> None:
    call = good(backend.device) | {bad.argument: bad.value.to(backend.device, copy=True)}
    for value in call.values():
        if value.is_floating_point():
            value.requires_grad_()
    with pytest.raises(RuntimeError, match=_match(bad)):
        backend.ops.forward(*call.values())


@pytest.mark.parametrize("bad", BAD, ids=IDS)
def test_fake_and_meta(backend: Backend, bad: Bad) -> None:
    """The same words while tracing, where nothing is computed."""
    call = good(backend.device) | {bad.argument: bad.value.to(backend.device)}
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) for value in call.values()]
        with pytest.raises((RuntimeError, bad.error), match=_match(bad)):
            backend.ops.forward(*fakes)
    with pytest.raises((RuntimeError, bad.error), match=_match(bad)):
        backend.ops.forward(*(value.to("meta") for value in call.values()))


@pytest.mark.parametrize("name", NAMES)
def test_mixed_devices(name: str) -> None:
    call = good()
    call[name] = call[name].to("meta")
    expected = r"input.*cpu.*meta|input.*meta.*cpu"
    if name != "input":
        expected = rf"{name}.*cpu.*meta"
    with pytest.raises(ValueError, match=expected):
        cbam_ext.cbam(**call)


@pytest.mark.parametrize("name", NAMES[:2])
def test_mixed_devices_of_the_operator(backend: Backend, name: str) -> None:
    call = good(backend.device)
    call[name] = call[name].to("meta")
    # One meta tensor takes the whole call to the fake kernel, whose errors are the function's.
    with pytest.raises((RuntimeError, ValueError), match=r"device.*meta"):
        backend.ops.forward(*call.values())


@pytest.mark.parametrize("name", operators.NAMES)
def test_kernels_ask_for_the_devices(
    backend: Backend, name: str, generator: torch.Generator
) -> None:
    """As they are met where CPU and CUDA are mixed: no fake kernel is asked then."""
    arguments = draw(Problem((2, 6, 4, 5), 3, 5, biases="12c"), generator, backend.device)
    call = operators.calls(backend.ops, arguments, generator)[name]
    overload = getattr(backend.ops, name).default
    kernel = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, backend.device.type.upper()))
    overload.redispatch(kernel, *call)
    for place, argument in enumerate(overload._schema.arguments):
        if isinstance(call[place], Tensor) and argument.name != "input":
            mixed = [*call[:place], call[place].to("meta"), *call[place + 1 :]]
            with pytest.raises(RuntimeError, match=f"{argument.name} must be on the device of inp"):
                overload.redispatch(kernel, *mixed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [[1.0], 3, "x"], ids=str)
def test_no_tensor(name: str, value: object) -> None:
    with pytest.raises(
        TypeError, match=f"{name} must be a torch.Tensor, got {type(value).__name__}"
    ):
        cbam_ext.cbam(**(good() | {name: value}))


def test_none_where_a_tensor_is_needed() -> None:
    with pytest.raises(TypeError, match="input must be a torch.Tensor, got NoneType"):
        cbam_ext.cbam(**(good() | {"input": None}))


TOGETHER = "fc1_weight and fc2_weight must be given together"
PARTS_OF_GATES = {
    "no fc1": (["fc1_weight"], TOGETHER),
    "no fc2": (["fc2_weight", "fc1_bias", "fc2_bias"], TOGETHER),
    "biases of no MLP": (["fc1_weight", "fc2_weight"], "fc1_bias and fc2_bias must be None where"),
    "a bias of no MLP": (
        ["fc1_weight", "fc2_weight", "fc2_bias"],
        "fc1_bias and fc2_bias must be None where",
    ),
    "bias of no convolution": (["conv_weight"], "conv_bias must be None where conv_weight is"),
    "nothing": (NAMES[1:], "weights of at least one gate must be given"),
}


@pytest.mark.parametrize("case", PARTS_OF_GATES)
def test_parts_of_gates(backend: Backend, case: str) -> None:
    missing, words = PARTS_OF_GATES[case]
    call = good(backend.device) | dict.fromkeys(missing)
    with pytest.raises(ValueError, match=words):
        cbam_ext.reference.cbam(**call)
    if backend.namespace == "cbam":
        with pytest.raises(ValueError, match=words):
            cbam_ext.cbam(**call)
    for name in ("forward", "gates", "_forward_train", "_logits"):
        with pytest.raises(RuntimeError, match=words):
            getattr(backend.ops, name)(*call.values())
    with FakeTensorMode() as mode:
        fake = [None if t is None else mode.from_tensor(t) for t in call.values()]
        with pytest.raises(ValueError, match=words):
            torch.ops.cbam.forward(*fake)


@pytest.mark.parametrize("name", ["input", "fc1_weight"])
def test_sparse_tensors(name: str) -> None:
    call = good()
    with pytest.raises(TypeError, match=f"{name} must be a dense .*sparse"):
        cbam_ext.cbam(**(call | {name: call[name].to_sparse()}))


def test_half_input_takes_two_parameter_dtypes() -> None:
    call = good()
    call["input"] = call["input"].half()
    call["fc1_weight"] = call["fc1_weight"].half()
    assert cbam_ext.cbam(**call).dtype == torch.float16
    with pytest.raises(TypeError, match=r"fc1_bias must be float32 or float16.*got bfloat16"):
        cbam_ext.cbam(**(call | {"fc1_bias": call["fc1_bias"].bfloat16()}))


def test_an_error_leaves_nothing_behind(backend: Backend) -> None:
    call = good(backend.device)
    expected = backend.ops.forward(*call.values())
    for bad in BAD:
        with pytest.raises(RuntimeError):
            backend.ops.forward(*(call | {bad.argument: bad.value.to(backend.device)}).values())
    assert torch.equal(backend.ops.forward(*call.values()), expected)


# -------------------------------------------------------------------------------------- module


@pytest.mark.parametrize("name", ["in_channels", "reduction", "kernel_size", "hidden_channels"])
@pytest.mark.parametrize("value", [0, -1])
def test_module_options_not_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        cbam_ext.CBAM(**({"in_channels": 8} | {name: value}))


@pytest.mark.parametrize("name", ["in_channels", "reduction", "kernel_size", "hidden_channels"])
@pytest.mark.parametrize("value", [2.0, "3", True, (3, 3)], ids=str)
def test_module_options_of_a_wrong_type(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int, got {type(value).__name__}"):
        cbam_ext.CBAM(**({"in_channels": 8} | {name: value}))


@pytest.mark.parametrize("kernel_size", [2, 4, 48])
def test_module_with_an_even_kernel(kernel_size: int) -> None:
    with pytest.raises(ValueError, match=f"kernel_size must be odd, got {kernel_size}"):
        cbam_ext.CBAM(8, kernel_size=kernel_size)


def test_module_with_a_norm_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"norm_layer.* must return a torch.nn.Module, got int"):
        cbam_ext.CBAM(8, norm_layer=lambda channels: channels)


def test_module_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        cbam_ext.CBAM(8, 16, 7, 4)


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("method", ["__call__", "attention"])
def test_module_with_a_wrong_input(norm_layer: type[nn.Module] | None, method: str) -> None:
    call = getattr(cbam_ext.CBAM(8, norm_layer=norm_layer), method)
    with pytest.raises(
        ValueError, match=r"fc1_weight must have shape \[R, 9\].*got shape \[1, 8\]"
    ):
        call(R(2, 9, 4, 4))
    with pytest.raises(ValueError, match="4 dimensions"):
        call(R(8, 4, 4))
    with pytest.raises(TypeError, match=r"input must be float64.*got int64"):
        call(torch.zeros(2, 8, 4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="fc1_weight must be float64 for an input of float64"):
        call(R(2, 8, 4, 4).double())
