"""Gives one module another forward, and leaves everything else about it as it is.

The module keeps its attributes, methods, hooks and submodules; only its class becomes a subclass of
what it was, with a forward that a torch.fx graph wrote. Copies and pickles carry that forward.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import linecache
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn

_numbers = itertools.count()


@dataclass(frozen=True)
class Code:
    """A forward: its source, and what the names in it stand for (modules by their own name)."""

    source: str
    modules: tuple[tuple[str, str], ...]
    objects: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(graph: fx.Graph) -> Code:
        for node in graph.nodes:
            node.type = None  # annotations may be names that the new code does not know
        written = graph.python_code("self")
        modules, objects = [], []
        for name, value in written.globals.items():
            if not re.search(rf"\b{re.escape(name)}\b", written.src):
                continue  # torch.fx offers some names always
            if isinstance(value, ModuleType):
                modules.append((name, value.__name__))
            else:
                objects.append((name, value))
        return Code(written.src, tuple(modules), tuple(objects))


class Rewritten:
    """Mixed into the class of a module whose forward was rewritten."""

    _rewritten_from: tuple[type[nn.Module], Code]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, self._rewritten_from, self.__dict__


def rewrite(module: nn.Module, graph: fx.Graph) -> None:
    """Makes ``module`` run ``graph``, whose names are those of its submodules."""
    module.__class__ = _subclass(type(module), Code.of(graph))


def _new(original: type[nn.Module], code: Code) -> nn.Module:
    cls = _subclass(original, code)
    return cls.__new__(cls)


@functools.cache
def _subclass(original: type[nn.Module], code: Code) -> type[nn.Module]:
    # TorchScript and tracebacks look up source by file.
    file = f"<forward of {original.__qualname__}, rewritten, {next(_numbers)}>"
    lines = code.source.splitlines(keepends=True)
    linecache.cache[file] = (len(code.source), None, lines, file)
    names: dict[str, Any] = dict(code.objects)
    names |= {name: importlib.import_module(module) for name, module in code.modules}
    exec(compile(code.source, file, "exec"), names)
    members = {
        "forward": names["forward"],
        "_rewritten_from": (original, code),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (Rewritten, original), members)
