"""Who else in a model refers to a module: what must be known before it is replaced."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .structure import RefusalError


class References:
    """The modules and tensors of a model, with who holds them, as they were before a conversion."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: dict[nn.Module | Tensor, set[nn.Module]] = defaultdict(set)
        self._attributes: dict[nn.Module, set[nn.Module]] = defaultdict(set)
        for holder in model.modules():
            held = (*holder._modules.values(), *holder._parameters.values())
            for each in (*held, *holder._buffers.values()):
                if each is not None:
                    self._holders[each].add(holder)
            for name, value in vars(holder).items():
                if name not in ("_modules", "_parameters", "_buffers"):
                    for module in _modules_in(value):
                        self._attributes[module].add(holder)

    def check(self, replaced: Iterable[nn.Module], owner: nn.Module | None = None) -> None:
        """Whether the model knows ``replaced`` as its submodules alone, of ``owner`` if given.

        Raises:
            RefusalError: some of it would go on being used, or shares parameters.
        """
        tops = list(replaced)
        inside = {module for top in tops for module in top.modules()}
        for module in inside:
            holders = self._holders[module] - inside
            if module in tops:
                holders -= {owner} if owner is not None else holders
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    holders |= self._holders[tensor] - inside
            for holder in holders:
                raise RefusalError(f"it shares layers or weights with {_described(holder)}")
            for holder in self._attributes[module] - inside:
                raise RefusalError(f"{_described(holder)} also keeps it in an attribute")


def _described(module: nn.Module) -> str:
    return f"another module, {type(module).__name__},"


def _modules_in(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules that an attribute refers to, in lists, dicts and bound methods too."""
    if isinstance(value, nn.Module):
        yield value
    elif depth == 0 or isinstance(value, str | Tensor):
        return
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _modules_in(inner, depth - 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _modules_in(inner, depth - 1)
    elif isinstance(value, functools.partial):
        yield from _modules_in((value.func, *value.args, value.keywords), depth - 1)
    elif isinstance(getattr(value, "__self__", None), nn.Module):
        yield value.__self__
