"""Where in a model a CBAM can stand: :func:`find_places`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import reference
from .choice import RESIDUAL, choose
from .hooks import CHILD
from .residual import Residual, residual_blocks
from .survey import Output, Seen, Survey, Value

# What the user calls it, how it is written, and where in it the channels are.
LAYOUTS = {"nchw": ("[N, C, H, W]", 1), "nhwc": ("[N, H, W, C]", 3)}


class Place(NamedTuple):
    """A module whose output a CBAM refines, or its input."""

    host: nn.Module
    channels: int
    device: torch.device
    dtype: torch.dtype
    nhwc: bool
    before: bool


def find_places(
    model: nn.Module, after: Any, run: Callable[[], Survey], layout: str = "nchw"
) -> list[Place]:
    """A place for each feature map that ``after``, as checked, means, in order.

    Warns of residual blocks without a place; who calls this is called by users.

    Args:
        run: surveys ``model``, once the names in ``after`` are found.

    Raises:
        ValueError: there is none, or a module that was named has no such output.
    """
    names = choose(model, after)
    found = run()
    hosts: dict[Value, tuple[str, bool]] = {}
    for name in names:
        _check_is_run_once(found, name)
        output = _check_is_map(found, name, layout)
        assert output.value is not None
        hosts.setdefault(output.value, (_host(found, name, output.value), False))
    if not callable(after) and RESIDUAL in after:
        hosts.update(_ends_of_branches(model, found, layout))
    return [
        _place(model, found, name, layout, before) for _, (name, before) in sorted(hosts.items())
    ]


def _place(model: nn.Module, found: Survey, name: str, layout: str, before: bool) -> Place:
    seen = found.seen[name]
    assert seen.output is not None
    if hasattr(seen.module, CHILD):
        raise ValueError(
            f"add_cbam: {_quoted(name)} has a {CHILD!r} of its own, the name that the new one "
            "would have; name another module"
        )
    channels = seen.output.shape[LAYOUTS[layout][1]]
    dtype = _dtype(model, name, seen.output.dtype)
    nhwc = layout == "nhwc"
    return Place(seen.module, channels, seen.output.device, dtype, nhwc, before)


def _dtype(model: nn.Module, name: str, of_map: torch.dtype) -> torch.dtype:
    """That of the parameters around, which is not that of a map where a model casts it."""
    while True:
        for parameter in model.get_submodule(name).parameters():
            if parameter.dtype in (of_map, reference.accumulator_dtype(of_map)):
                return parameter.dtype
        if not name:
            return of_map
        name = name.rpartition(".")[0]


# ---------------------------------------------------------------------- modules that were named


def _check_is_run_once(found: Survey, name: str) -> None:
    calls = found.seen[name].calls
    if calls == 1:
        return
    if calls:
        raise ValueError(
            f"add_cbam: {_quoted(name)} is run {calls} times in one call of the model, on maps "
            "that would have one CBAM in common; name a module that is run once, such as the one "
            "around it"
        )
    raise ValueError(
        f"add_cbam: {_quoted(name)} is not run, or not by calling it, when the model is called in "
        "eval mode with example_inputs; name another module"
    )


def _check_is_map(found: Survey, name: str, layout: str) -> Output:
    output = found.seen[name].output
    assert output is not None
    written, _ = LAYOUTS[layout]
    if output.value is None or len(output.shape) != 4 or not output.dtype.is_floating_point:
        got = _described(output)
        raise ValueError(
            f"add_cbam: {_quoted(name)} returns {got}, and not a feature map {written}; name a "
            "module that returns one, such as one inside or before it"
        )
    _check_layout(found, name, output, layout)
    return output


def _described(output: Output) -> str:
    article = "an" if output.kind[0].lower() in "aeiou" else "a"
    if not output.shape:
        return f"{article} {output.kind}"
    return f"{article} {output.kind} {list(output.shape)} of {output.dtype}"


def _check_layout(found: Survey, name: str, output: Output, layout: str) -> None:
    (other,) = LAYOUTS.keys() - {layout}
    if _is_of_images(found, output, other) and not _is_of_images(found, output, layout):
        raise ValueError(
            f"add_cbam: {_quoted(name)} returns {list(output.shape)}, which looks like "
            f"{LAYOUTS[other][0]}; pass layout={other!r}, or, if it is {LAYOUTS[layout][0]} after "
            "all, example_inputs of another size"
        )


def _is_of_images(found: Survey, output: Output, layout: str) -> bool:
    """Whether height and width are to each other as those of the images, up to rounding."""
    sizes = [
        size for place, size in enumerate(output.shape) if place not in (0, LAYOUTS[layout][1])
    ]
    height, width = sizes
    return any(
        abs(height * image_width - width * image_height) < max(image_height, image_width)
        for image_height, image_width in found.images
    )


def _host(found: Survey, name: str, value: Value) -> str:
    """Where to hook what ``name`` returns.

    Not at a module that runs or counts its children, which a CBAM would join; there, at the one of
    them that returned that very map last.
    """
    inside = f"{name}." if name else ""
    hosts = [
        (seen.finished, other)
        for other, seen in _with_output(found, value)
        if (other == name or other.startswith(inside)) and not seen.runs_children
    ]
    if not hosts:
        raise ValueError(
            f"add_cbam: {_quoted(name)} runs or counts its children, which a CBAM would join, and "
            "none of them that is run once returns its output; name one of them or another module"
        )
    return max(hosts)[1]


def _with_output(found: Survey, value: Value) -> Iterator[tuple[str, Seen]]:
    """The modules that are run once and return ``value``."""
    for name, seen in found.seen.items():
        if seen.calls == 1 and seen.output is not None and seen.output.value == value:
            yield name, seen


# ------------------------------------------------------------------------------ residual branches


def _ends_of_branches(
    model: nn.Module, found: Survey, layout: str
) -> dict[Value, tuple[str, bool]]:
    hosts, without = {}, []
    for block in residual_blocks(found):
        host = _host_at_end(found, block)
        if host is None:
            without.append(block.block)
            continue
        output = found.seen[host[0]].output
        assert output is not None
        _check_layout(found, host[0], output, layout)
        hosts[block.end] = host
    if not hosts:
        reason = "no block of feature maps adds its input"
        if without:
            reason = f"in the blocks that add their input, {_listed(without)}, {_NO_END}"
        raise ValueError(
            f"add_cbam: {RESIDUAL!r}: in {type(model).__name__} {reason}; name other places"
        )
    if without:
        warnings.warn(
            f"add_cbam: no CBAM in {_listed(without)}, which add their input, because {_NO_END}",
            UserWarning,
            stacklevel=5,  # past find_places, its caller and the decorator of that
        )
    return hosts


_NO_END = "no module that is run once ends their residual branch"


def _host_at_end(found: Survey, block: Residual) -> tuple[str, bool] | None:
    """The module that ends a residual branch, and whether the CBAM stands before it.

    What passes its input on in evaluation, as DropPath and Dropout do, comes after the CBAM: a
    branch that is dropped is dropped as a whole.
    """
    inside = f"{block.block}." if block.block else ""
    ends = [
        (seen.finished, name, seen)
        for name, seen in _with_output(found, block.end)
        if name.startswith(inside) and name and not seen.runs_children
    ]
    made = [(finished, name) for finished, name, seen in ends if not seen.passes]
    if made:
        return max(made)[1], False
    passed = [(finished, name) for finished, name, seen in ends if seen.only_input]
    return (min(passed)[1], True) if passed else None


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(map(_quoted, names)))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _quoted(name: str) -> str:
    return repr(name) if name else "the model itself"
