"""The operator in two phases, as around a norm: values and gradients on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cbam_ext import ops

from support.backends import Backend
from support.samples import (
    DTYPES,
    PROBLEMS,
    Arguments,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    truth,
)

# The norm of these tests: a power of two, so that it folds into the convolution without rounding,
# and the operator in one phase is the truth.
SCALE = 0.5


def in_two_phases(backend: Backend, arguments: list[Tensor | None]) -> Tensor:
    namespace = backend.namespace
    channel_gate, logits, carriers = ops.spatial_logits(*arguments, namespace=namespace)
    return ops.apply_gates(
        arguments[0], channel_gate, SCALE * logits, carriers, namespace=namespace
    )


def folded(arguments: Arguments) -> Arguments:
    weight, bias = arguments.conv_weight, arguments.conv_bias
    return arguments._replace(
        conv_weight=None if weight is None else SCALE * weight,
        conv_bias=None if bias is None else SCALE * bias,
    )


@pytest.mark.every_isa
@pytest.mark.emulate(one_in=3)
@pytest.mark.parametrize("problem", PROBLEMS[::3], ids=str)
def test_values_and_gradients(
    backend: Backend, problem: Problem, generator: torch.Generator
) -> None:
    arguments = draw(problem, generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    present = [t for t in leaves if t is not None]

    output = in_two_phases(backend, leaves)
    found = iter(torch.autograd.grad(output, present, grad_output))

    one_phase = folded(Arguments(*(None if t is None else t.detach() for t in leaves)))
    assert output.dtype == problem.dtype
    assert output.stride() == arguments.input.stride()
    assert_close(output.detach(), truth(one_phase).output, "output")
    gradients = [None if t is None else next(found) for t in leaves]
    assert_gradients_close(gradients, one_phase, grad_output, conv_scale=SCALE)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    problem = Problem((0, 5, 4, 3), 3, 2, dtype, layout, "mixed", "12c")
    leaves = [t.requires_grad_() for t in draw(problem, generator, backend.device)]
    output = in_two_phases(backend, leaves)
    assert output.shape == (0, 5, 4, 3)
    for gradient, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_odd_strides_everywhere(backend: Backend, generator: torch.Generator) -> None:
    """Between the phases any module may stand, with maps and gradients as it likes them."""
    problem = Problem((3, 7, 5, 6), 3, 2, biases="12c")
    x, *parameters = draw(problem, generator, backend.device)
    plain = backend.ops._logits(x, *parameters)
    gate, logits = (t.repeat_interleave(2, 0)[::2] for t in plain)
    assert not logits.is_contiguous()
    sliced = x.repeat_interleave(2, 3)[..., ::2]
    g = draw_like(x, generator).contiguous(memory_format=torch.channels_last)
    for name, odd, dense in (
        ("_apply", (sliced, gate, logits), (x, *plain)),
        ("_apply_backward", (g, sliced, gate, logits), (g.contiguous(), x, *plain)),
    ):
        operator = getattr(backend.ops, name)
        found, expected = operator(*odd), operator(*dense)
        if name == "_apply":
            found, expected = [found], [expected]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("_apply", i) for i in (1, 2)),
        *(("_apply_backward", i) for i in (0, 2, 3)),
        *(("_logits_backward", i) for i in (0, 2, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_bad_maps(
    backend: Backend, name: str, argument: int, wrong: str, generator: torch.Generator
) -> None:
    """These operators are private, but no call of theirs may read past the end of a tensor."""
    x, *parameters = draw(Problem((2, 6, 4, 5), 3, 2), generator, backend.device)
    gate, logits = backend.ops._logits(x, *parameters)
    call = {
        "_apply": [x, gate, logits],
        "_apply_backward": [x, x, gate, logits],
        "_logits_backward": [x, x, gate, logits, gate, logits, *parameters, True, True, True],
    }[name]
    tensor = call[argument]
    call[argument] = tensor[:, :, :1, :0] if wrong == "shape" else tensor.to(torch.float16)
    words = (
        "must have shape .*, got shape" if wrong == "shape" else "must be float32 .*, got float16"
    )
    with pytest.raises(RuntimeError, match=words):
        getattr(backend.ops, name)(*call)
