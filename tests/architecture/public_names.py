"""The public names of the package with their signatures, as lines of text.

``python tests/architecture/public_names.py`` prints them; public_names.txt holds what has been
promised.
"""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

# Where users find names. All other modules are the package's own affair, underscore or not.
MODULES = (
    "cbam_ext",
    "cbam_ext.conversion",
    "cbam_ext.cost",
    "cbam_ext.functional",
    "cbam_ext.module",
    "cbam_ext.plan",
    "cbam_ext.reference",
    "cbam_ext.smp",
    "cbam_ext.visualization",
)


def lines() -> list[str]:
    """One for each name, function, class, method, property and field."""
    return [line for name in MODULES for line in _of_module(name)]


def _of_module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for member, value in sorted(vars(module).items()):
        # None of what torch.jit.script puts there.
        of = getattr(value, "__module__", None) or ""
        defined_here = of == name or of.startswith(f"{name}.")
        if member in getattr(module, "__all__", ()) or (defined_here and member[0] != "_"):
            yield from _of_value(f"{name}.{member}", value)


def _of_value(name: str, value: Any) -> Iterator[str]:
    if inspect.ismodule(value) or isinstance(value, str | int | float | enum.Enum):
        yield f"{name}: {type(value).__name__}"
    elif inspect.isclass(value):
        yield f"class {name}{inspect.signature(value)}"
        for member, own in sorted(vars(value).items()):
            if member.startswith("_"):
                continue
            if isinstance(own, property):
                yield f"{name}.{member}: property"
            elif callable(own) or isinstance(own, classmethod | staticmethod):
                yield f"{name}.{member}{inspect.signature(getattr(value, member))}"
    elif callable(value):
        yield f"{name}{inspect.signature(value)}"


if __name__ == "__main__":
    print(*lines(), sep="\n")
