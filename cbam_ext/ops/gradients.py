"""Operators that compute gradients, and their own derivatives: formulas in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import Function

from ..reference import backward as formulas
from .calls import call
from .derivatives import Results, pull, push

PARAMETERS = 6  # fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias


def groups(wanted: Sequence[bool]) -> tuple[bool, bool, bool]:
    """Which gradients the kernels compute: of the input, of the MLP, of the convolution."""
    return wanted[0], any(wanted[1:5]), any(wanted[5:7])


def select(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asked for."""
    return tuple(grad if want else None for grad, want in zip(gradients, wanted, strict=True))


def call_backward(namespace: str, name: str, *arguments: Any) -> Results:
    """Calls an operator that computes gradients, differentiable if transforms are to see that."""
    if _are_functorch_transforms_active():
        return BACKWARD[name].apply(namespace, *arguments)
    return call(namespace, name, *arguments)


def _backward_function(
    name: str, formula: Callable[..., tuple[Tensor | None, ...]]
) -> type[Function]:
    """A Function for an operator that computes gradients; ``formula`` has its derivatives.

    The formula takes the tensors among the operator's arguments and returns its results.
    """

    def is_computed(result: Tensor) -> bool:
        return result.shape != (0,)  # the kernels' way to leave a gradient out

    def results(asked: Sequence[int]) -> Callable[..., Results]:
        def function(*tensors: Tensor | None) -> Results:
            found = formula(*tensors)
            return tuple(result for i in asked if (result := found[i]) is not None)

        return function

    class Backward(Function):
        @staticmethod
        def forward(namespace: str, *arguments: Any) -> Results:
            return call(namespace, name, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Results) -> None:
            _, *arguments = inputs
            ctx.flags = [argument for argument in arguments if isinstance(argument, bool)]
            ctx.computed = [i for i, result in enumerate(output) if is_computed(result)]
            ctx.mark_non_differentiable(*(result for result in output if not is_computed(result)))
            ctx.set_materialize_grads(False)
            tensors = arguments[: len(arguments) - len(ctx.flags)]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.results = len(output)

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            found = push(results(ctx.computed), tensors, tangents[: len(tensors)])
            by_index = dict(zip(ctx.computed, found, strict=True))
            return tuple(by_index.get(i) for i in range(ctx.results))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            asked = [i for i, gradient in enumerate(gradients) if gradient is not None]
            tensors, no_flags = ctx.saved_tensors, [None] * len(ctx.flags)
            if not asked:
                return (None, *[None] * len(tensors), *no_flags)
            given = tuple(gradient for gradient in gradients if gradient is not None)
            return (None, *pull(results(asked), tensors, given), *no_flags)

        @staticmethod
        def vmap(
            info: Any, in_dims: tuple[int | None, ...], *arguments: Any
        ) -> tuple[Results, tuple[int, ...]]:
            # Gradients of the parameters sum over a batch, so examples cannot share one.
            return vmap_by_loop(Backward, info.batch_size, in_dims, arguments)

    Backward.__name__ = "".join(word.capitalize() for word in name.split("_"))
    return Backward


def vmap_by_loop(
    function: type[Function], batch_size: int, in_dims: tuple[int | None, ...], arguments: tuple
) -> tuple[Results, tuple[int, ...]]:
    results = [
        function.apply(
            *(
                argument if dim is None else argument.select(dim, i)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(batch_size)
    ]
    rows = [(result,) if isinstance(result, Tensor) else result for result in results]
    outputs = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)


BACKWARD = {
    "_backward": _backward_function("_backward", formulas.backward),
    "_logits_backward": _backward_function("_logits_backward", formulas.logits_backward),
    "_apply_backward": _backward_function("_apply_backward", formulas.apply_backward),
}
