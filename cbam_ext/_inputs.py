"""How a model is run for a look at it: what it is called with, and that it stays as it was."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

_RULE = (
    "a tuple holds the positional arguments, a dict the keyword arguments, and anything else, a "
    "list too, is one argument"
)


class Call(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: nn.Module) -> Any:
        """What ``model`` returns.

        Raises:
            TypeError: its forward takes other arguments.
        """
        try:
            return model(*self.args, **self.kwargs)
        except TypeError as error:
            misfit = self._misfit(model)
            if misfit is None:
                raise  # something else, further inside
            raise TypeError(
                f"{type(model).__name__} cannot be called with these inputs, {misfit}: {_RULE}"
            ) from error

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same with every tensor changed, those in lists, tuples and dicts too."""
        changed: Call = tree_map_only(Tensor, change, self)
        return changed

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [leaf for leaf in tree_leaves(self) if isinstance(leaf, Tensor)]

    def _misfit(self, model: nn.Module) -> str | None:
        """What the signature of forward says against this; asked only after a call has failed,
        since hooks may change the arguments."""
        try:
            signature = inspect.signature(model.forward)
        except (TypeError, ValueError):
            return None
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            return str(error)
        return None


def as_call(given: Any) -> Call:
    """How a model is called with ``given``.

    A tuple holds the positional arguments, a dict the keyword arguments. Anything else is the one
    argument: a tensor, and a list as well, for models that take a list of images. For a tuple or a
    dict that is itself the argument: a tuple of it. A namedtuple is one argument, as torch's
    ``PackedSequence`` is.

    Raises:
        TypeError: a dict whose keys are not names.
    """
    if type(given) is tuple:
        return Call(given, {})
    if not isinstance(given, dict):
        return Call((given,), {})
    for key in given:
        if not isinstance(key, str):
            raise TypeError(
                f"a dict of inputs holds keyword arguments, but has the key {key!r}; for a model "
                "that takes this dict itself give it in a tuple, (inputs,)"
            )
    return Call((), dict(given))


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients or compiling, and everything back as it was at the end."""
    training = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    gpus = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(gpus), _uncompiled():
        try:
            # By attribute, because train() and eval() of some modules do more, merging weights say.
            for module, _ in training:
                module.training = False
            yield
        finally:
            for module, flag in training:
                module.training = flag


def _uncompiled() -> contextlib.AbstractContextManager[object]:
    # Importing the compiler takes seconds, and nothing can be compiled before somebody has.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
