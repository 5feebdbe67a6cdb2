"""Runs a model once and notes what its modules do: :func:`survey`."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .._inputs import Call, left_alone
from .hooks import CHILD, is_collection

# A value is numbered when an operator makes it or writes into it, in order. Who has the same
# number has the same tensor with the same contents.
Value = int


class Output(NamedTuple):
    """What a module returned."""

    value: Value | None  # None: no tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kind: str  # the name of its class


@dataclass
class Seen:
    """What a module did in all of its calls; the last one counts for what came in and out."""

    module: nn.Module
    calls: int = 0
    started: Value = 0  # values that were made in the call have this number or a higher one
    finished: int = 0  # the place among all calls that ended
    input: Value | None = None  # the first tensor that it was given
    only_input: bool = False  # that was its one argument
    output: Output | None = None
    runs_children: bool = False  # whatever they are

    @property
    def passes(self) -> bool:
        """Whether it returned what it was given, as Dropout does in evaluation."""
        return self.output is not None and None is not self.output.value == self.input


class Addition(NamedTuple):
    """Two feature maps of one shape were added in the forward of the module ``block`` itself."""

    block: str
    started: Value  # where the block began
    input: Value | None  # what it was given
    summands: tuple[Value, Value]


@dataclass
class Survey:
    seen: dict[str, Seen]  # by name, in the order of named_modules()
    images: list[tuple[int, int]]  # height and width of what was put in
    parents: list[tuple[Value, ...]] = field(default_factory=list)  # of each value
    is_convolved: list[bool] = field(default_factory=list)  # each value, by the operator itself
    additions: list[Addition] = field(default_factory=list)


def survey(model: nn.Module, call: Call) -> Survey:
    """Runs ``model``, in eval mode, where that works on fake tensors, which hold no numbers.

    Afterwards it is as it was, plain attributes included, which some models write in forward.

    Raises:
        Exception: what the model raises on real tensors.
    """
    with left_alone(model), _attributes_kept(model):
        try:
            return _on_fakes(model, call)
        except Exception:  # of any kind: what depends on numbers, or does not know fake tensors
            pass
    with left_alone(model), _attributes_kept(model), _numbers_kept(model):
        device = _device(model)
        moved = call.map(lambda t: t.detach().to(device, copy=True))
        return _watched(model, moved, moved.run)


def _on_fakes(model: nn.Module, call: Call) -> Survey:
    # Imported here, because it takes longer than the rest of the package.
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {
        name: mode.from_tensor(tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    device = _device(model)
    with mode:
        fake = call.map(lambda t: mode.from_tensor(t.detach()).to(device))
        return _watched(
            model, fake, lambda model: functional_call(model, tensors, fake.args, fake.kwargs)
        )


def _device(model: nn.Module) -> torch.device | None:
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    return None if tensor is None else tensor.device


# ------------------------------------------------------------------------------ what is noted


def _watched(model: nn.Module, call: Call, run: Callable[[nn.Module], Any]) -> Survey:
    modules = dict(model.named_modules())
    images = [tuple(t.shape[-2:]) for t in call.tensors() if t.ndim >= 3]
    notes = Survey({name: Seen(module) for name, module in modules.items()}, images)
    with _Notebook(notes) as notebook:
        for tensor in call.tensors():
            notebook.number(tensor, ())
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            notebook.watch(name, module)
        run(model)
    return notes


class _Notebook(TorchDispatchMode):
    """Numbers values, and knows in whose forward they are made."""

    def __init__(self, notes: Survey) -> None:
        super().__init__()
        self.notes = notes
        self._values = WeakTensorKeyDictionary()
        self._stack: list[str] = []
        self._ended = 0

    # Modules

    def watch(self, name: str, module: nn.Module) -> None:
        """Until the attributes of ``module`` are put back."""
        # Hooks of others would see no numbers; those before a forward stay, by which some set
        # parameters.
        module._forward_hooks = OrderedDict()
        module.register_forward_pre_hook(self._begin(name), with_kwargs=True)
        module.register_forward_hook(self._end(name), with_kwargs=True)
        seen = self.notes.seen[name]
        if is_collection(module):
            seen.runs_children = True
        elif not hasattr(module, CHILD):
            module._modules[CHILD] = _Probe(seen)

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = self.notes.seen[name]
            seen.calls += 1
            seen.started = len(self.notes.parents)
            first = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
            seen.input = self._known(first)
            seen.only_input = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            self._stack.append(name)

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while self._stack.pop() != name:  # a forward inside was broken off
                pass
            seen = self.notes.seen[name]
            self._ended += 1
            seen.finished = self._ended
            seen.output = self._described(output)

        return hook

    def _described(self, output: Any) -> Output:
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            return Output(None, (), torch.float32, torch.device("cpu"), kind)
        shape = tuple(map(int, output.shape))
        return Output(self._known(output), shape, output.dtype, output.device, "tensor")

    # Values

    def number(
        self, tensor: Tensor, parents: tuple[Value, ...], is_convolved: bool = False
    ) -> None:
        self._values[tensor] = len(self.notes.parents)
        self.notes.parents.append(parents)
        self.notes.is_convolved.append(is_convolved)

    def _known(self, thing: Any) -> Value | None:
        return self._values.get(thing) if isinstance(thing, Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = [self._known(leaf) for leaf in tree_leaves((args, kwargs))]
        parents = tuple(value for value in known if value is not None)
        if func in _ADDITIONS and self._stack and _are_maps(*args[:2]):
            summands = self._known(args[0]), self._known(args[1])
            if None not in summands:
                block = self.notes.seen[self._stack[-1]]
                self.notes.additions.append(
                    Addition(self._stack[-1], block.started, block.input, summands)
                )
        result = func(*args, **kwargs)
        is_convolved = func in _CONVOLUTIONS
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.number(leaf, parents, is_convolved)
        return result


_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
)


def _are_maps(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.ndim == 4 and one.shape == other.shape


class _Probe(nn.Module):
    """A child that nobody knows: who calls it runs whatever children there are."""

    def __init__(self, of: Seen) -> None:
        super().__init__()
        self._of = [of]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._of[0].runs_children = True
        return next(iter((*args, *kwargs.values())), None)


# ------------------------------------------------------------------------------ what is kept


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Puts back attributes, hooks and children, and what dicts, lists and sets among them held."""
    kept = [(vars(module), dict(vars(module))) for module in model.modules()]
    collections = [
        (value, value.copy())
        for _, attributes in kept
        for value in attributes.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    try:
        yield
    finally:
        for attributes, before in kept:
            attributes.clear()
            attributes.update(before)
        for value, before in collections:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


@contextlib.contextmanager
def _numbers_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what is written into buffers and tensors that are plain attributes."""
    tensors = [*model.buffers()]
    tensors += [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, before in zip(tensors, copies, strict=True):
            # Some cannot be written, being views that repeat a number; those did not change.
            if not torch.equal(tensor, before):
                tensor.detach().copy_(before)
