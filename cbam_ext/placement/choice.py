"""Which modules of a model the user means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

RESIDUAL = "residual"

After = str | Iterable[str] | Callable[[str, nn.Module], bool]


def check_after(after: Any) -> Any:
    """``after`` as a list of patterns, or the function."""
    if isinstance(after, nn.Module) or not (callable(after) or isinstance(after, Iterable)):
        raise TypeError(_wanted(after))
    if callable(after):
        return after
    patterns = [after] if isinstance(after, str) else list(after)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(_wanted(pattern))
    if not patterns:
        raise ValueError(f"{_wanted(patterns)}: it is empty")
    return patterns


def _wanted(got: Any) -> str:
    got = type(got).__name__ if isinstance(got, nn.Module) else repr(got)
    return (
        "add_cbam: after must be the name of a module or a pattern such as 'layer[34].*', several "
        f"of these, a function of (name, module), or {RESIDUAL!r}, got {got}"
    )


def choose(model: nn.Module, after: Any) -> list[str]:
    """The modules that ``after``, as checked, means, by their first names.

    Without :data:`RESIDUAL`, for which the model has to run.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if callable(after):
        chosen = {module for name, module in model.named_modules() if after(name, module)}
        if not chosen:
            raise ValueError(
                f"add_cbam: the function after chose none of the {len(modules)} modules of "
                f"{type(model).__name__}; they are those of model.named_modules()"
            )
        return [name for name, module in model.named_modules() if module in chosen]
    chosen = set()
    for pattern in after:
        if pattern == RESIDUAL:
            continue
        found = [name for name in modules if _matches(name, pattern)]
        if not found:
            raise ValueError(
                f"add_cbam: {type(model).__name__} has no module {pattern!r}; "
                f"{_nearest(pattern, list(modules))}"
            )
        chosen.update(modules[name] for name in found)
    return [name for name, module in model.named_modules() if module in chosen]


def _matches(name: str, pattern: str) -> bool:
    """As in a shell, part by part, so that ``*`` does not go past a dot."""
    if not name or not pattern:  # the model itself, which no wildcard means
        return name == pattern
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _nearest(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.5)
    if not near:  # as deep as asked, or the top
        near = [name for name in names if name and "." not in name]
        return f"its children are {', '.join(map(repr, near[:10]))}"
    return f"near to that are {', '.join(map(repr, near))}"
