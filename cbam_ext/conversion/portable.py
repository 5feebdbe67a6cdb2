"""Modules and hooks that pickle as their code, for processes without this package.

A pickle names classes and functions by where they are imported from. That of a
``torch.fx.GraphModule`` holds source text instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from .graphs import trace

_HELD = ("_modules", "_parameters", "_buffers")
# Under it, in its meta, a GraphModule is told what to keep in copies. By its text, since the name
# of that is torch's own.
_PRESERVED = "_user_preserved_attributes"
# Ours: what load_peer_state_dict remembers of the module that a CBAM was converted from.
_OWN = ("_converted_from",)


class _Portable(fx.GraphModule):
    """A GraphModule whose copies and pickles keep its attributes, as those of other modules do.

    What a pickle makes is a plain GraphModule, whose copies keep those that they are told of in
    its ``meta``.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        _tell(copied, copy.deepcopy(self._attributes(), memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        _tell(self, self._attributes())
        return *super().__reduce__(), {**self._attributes(), "meta": self.meta}

    def _attributes(self) -> dict[str, Any]:
        """Those that no GraphModule has by itself."""
        fresh = vars(fx.GraphModule(nn.Module(), fx.Graph()))
        return {name: value for name, value in vars(self).items() if name not in fresh}


def _tell(module: fx.GraphModule, attributes: dict[str, Any]) -> None:
    vars(module).update(attributes)
    module.meta[_PRESERVED] = attributes


def portable(module: nn.Module, instead_of: nn.Module | None = None) -> fx.GraphModule:
    """A module that does what ``module`` does, with all that ``instead_of``, or ``module``, has.

    Raises:
        RefusalError: its forward cannot be written as a graph.
    """
    made = _graph_module(module, trace(module), type(module).__name__)
    hand_over(instead_of or module, made)
    return made


def portable_function(function: Callable[..., Any]) -> fx.GraphModule:
    """A module that does what ``function`` does with its arguments."""
    graph = fx.Tracer().trace(function)
    return _graph_module(nn.Module(), graph, function.__name__)


def _graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    # A graph remembers the class that traced it, and a pickle of the module would ask for it.
    plain = fx.Graph()
    plain.output(plain.graph_copy(graph, {}))
    for node in plain.nodes:
        node.type = None  # annotations may be names that the new code does not know
    return _Portable(root, plain, name)


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """Gives ``new`` the hooks, attributes, tensors and submodules of ``old`` that it lacks.

    Submodules and tensors come in the order that they had, which optimisers go by.
    """
    for kind in _HELD:
        held = vars(new)[kind]
        merged = {**vars(old)[kind], **held}
        held.clear()
        held.update(merged)
    base, taken = vars(nn.Module()), vars(new)
    taken.update(
        {
            name: value
            for name, value in vars(old).items()
            if name not in (*_HELD, *_OWN) and (name in base or name not in taken)
        }
    )
