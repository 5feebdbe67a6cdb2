"""The whole model on example inputs: what it returns, what its parts are called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._inputs import Call
from .behaviour import distance
from .pairs import has_forward, has_gates


def outputs_of(model: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that ``model`` returns for inference; ``model`` stays as it is."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            own = call.map(Tensor.clone)  # a forward may work in place, and there is another run
            found = [t for t in tree_leaves(own.run(model.eval())) if isinstance(t, Tensor)]
            if not found:
                raise ValueError(
                    "convert: with example_inputs the model returns no tensors, or in a class that "
                    "hides them; leave example_inputs out"
                )
            return found
    finally:
        for module, mode in modes.items():
            module.training = mode


def calls_of_gates(model: nn.Module, call: Call | None) -> dict[nn.Module, list[Call]]:
    """What each module with gates, and each child of it, is called with."""
    calls: dict[nn.Module, list[Call]] = {}
    if call is None:
        return calls
    parents = [module for module in model.modules() if has_forward(module) and has_gates(module)]
    handles = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, []).append(Call(args, kwargs))

    try:
        for module in {each for parent in parents for each in (parent, *parent.children())}:
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        if handles:
            outputs_of(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def compare_outputs(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for truth, found in zip(before, after, strict=True):
        # Half models round after every layer, ours and theirs at other places.
        limit = 1e-3 if truth.dtype in (torch.float32, torch.float64) else 0.1
        error = distance(truth, found)
        if not error <= limit:
            raise RuntimeError(
                f"convert: the output of the model on example_inputs changed by {error:.1e}. Some "
                "part of it asks for the class of a CBAM or calls what is in it, or the model is "
                "random in inference too (then pass check=False)"
            )
