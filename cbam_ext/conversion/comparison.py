"""Whether a module with a rewritten forward computes what it did: a trace does not see it all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._inputs import Call
from .behaviour import agree, distance
from .casts import WithoutCasts
from .structure import RefusalError

# Image sizes that a block, or a whole classifier, may be tried on.
_SIZES = (64, 224)


def compare(before: nn.Module, after: nn.Module, example: Call | None) -> None:
    """Runs copies of both in float64: a trace does not see what Python decides on the way."""
    modules = [_for_comparison(module) for module in (before, after)]
    failure = ""
    for inputs in _guessed_inputs(before) if example is None else (example,):
        given = _double(inputs)
        try:
            truth = _step(modules[0].eval(), given)
        except Exception as error:
            failure = f": {type(error).__name__}: {error}"
            continue  # not an input for this module
        both = zip(_double(inputs).tensors(), given.tensors(), strict=True)
        if any(distance(a, b) > 0 for a, b in both):
            raise RefusalError("its forward changes its input in place")
        if not _agree(truth, _step(modules[1].eval(), _double(inputs))):
            raise RefusalError("its rewritten forward computes something else")
        _compare_training(modules, inputs)
        return
    hint = "pass example_inputs to convert" if example is None else "which example_inputs give"
    raise RefusalError(f"it could not be run for a comparison, {hint}{failure}")


def _compare_training(modules: Sequence[nn.Module], inputs: Call) -> None:
    results = []
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        for module in modules:
            torch.set_rng_state(state)  # for dropout
            try:
                results.append(_step(module.train(), _double(inputs)))
            except Exception:
                results.append(None)
    # What cannot train, as where a product in place spoils a gate, has nothing to lose.
    if results[0] is not None and (results[1] is None or not _agree(*results)):
        raise RefusalError("its rewritten forward computes something else in training")


Results = dict[str, Tensor | None]


def _step(module: nn.Module, inputs: Call) -> Results:
    """Outputs, gradients of the floating inputs and of the parameters, and buffers after it."""
    with WithoutCasts():
        outputs = [t for t in tree_leaves(inputs.run(module)) if isinstance(t, Tensor)]
    results: Results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    leaves = {f"input {i}": t for i, t in enumerate(inputs.tensors()) if t.requires_grad}
    leaves |= {n: p for n, p in module.named_parameters() if p.requires_grad}
    total = sum(t.square().sum() for t in outputs if t.requires_grad)
    if module.training and isinstance(total, Tensor):
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        results |= dict(zip(leaves, gradients, strict=True))
    return results | dict(module.named_buffers())


def _agree(truth: Results, found: Results) -> bool:
    """Whether what both have is equal; the parts of the gates have other names in ours."""
    if [n for n in truth if n.startswith("output")] != [n for n in found if n.startswith("output")]:
        return False
    shared = truth.keys() & found.keys()
    return agree([truth[name] for name in shared], [found[name] for name in shared])


def _for_comparison(module: nn.Module) -> nn.Module:
    for inner in module.modules():  # those of a copy; they may do anything
        for hooks in (inner._forward_hooks, inner._forward_pre_hooks):
            hooks.clear()
        inner._backward_hooks.clear()
        inner._backward_pre_hooks.clear()
    return module.to("cpu", torch.float64)


def _double(inputs: Call) -> Call:
    def cast(tensor: Tensor) -> Tensor:
        copied = tensor.detach().to("cpu", copy=True)
        if not tensor.is_floating_point():
            return copied
        return copied.to(torch.float64).requires_grad_() * 1

    return inputs.map(cast)


def _guessed_inputs(parent: nn.Module) -> Iterator[Call]:
    """Maps of as many channels as the first convolution takes."""
    generator = torch.Generator().manual_seed(0)
    channels = next((m.in_channels for m in parent.modules() if isinstance(m, nn.Conv2d)), None)
    for size in _SIZES if channels is not None else ():
        yield Call((torch.randn(2, channels, size, size, generator=generator),), {})
