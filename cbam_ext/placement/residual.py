"""Blocks that add their input, found in what a model did."""

from __future__ import annotations

from typing import NamedTuple

from .survey import Addition, Survey, Value


class Residual(NamedTuple):
    """A block, and the value at the end of its residual branch, which it adds to a shortcut."""

    block: str
    end: Value


def residual_blocks(survey: Survey) -> list[Residual]:
    """Those of all blocks, in the order of the additions.

    A block adds what its branch was computed from, or what a shorter way, such as a convolution
    that changes the number of channels, made of its input. The model as a whole is no block, unless
    there is no other: networks that predict a residual of the image have that once more.
    """
    found: list[Residual] = []
    for addition in survey.additions:
        end = _end_of_branch(survey, addition)
        if end is not None:
            found.append(Residual(addition.block, end))
    inside = [each for each in found if each.block]
    return list(dict.fromkeys(inside or found))


def _end_of_branch(survey: Survey, addition: Addition) -> Value | None:
    """The one of both summands that ends the branch; None where the block is no residual one."""
    one, other = addition.summands
    from_one = _Way(survey, addition.started, one)
    from_other = _Way(survey, addition.started, other)
    if other in from_one.values - {one} or one in from_other.values - {other}:
        branch, shortcut = (
            (from_one, from_other) if other in from_one.values else (from_other, from_one)
        )
        # A norm or a gate that adds its input is no block.
        return branch.end if branch.length[0] > shortcut.length[0] else None
    if not (addition.input in from_one.values and addition.input in from_other.values):
        return None  # of two inputs, as where a decoder takes in a skip connection
    if from_one.length == from_other.length:
        return None
    shortcut, branch = sorted((from_one, from_other), key=lambda way: way.length)
    return branch.end if _is_output_within(survey, addition.started, shortcut.end) else None


class _Way:
    """From what a block was given to one of its values; ``started`` is where the block began."""

    def __init__(self, survey: Survey, started: Value, end: Value) -> None:
        self.end = end
        self.values: set[Value] = set()  # those on the way, and those where it begins
        waiting = [end]
        while waiting:
            value = waiting.pop()
            if value not in self.values:
                self.values.add(value)
                if value >= started:  # made by the block
                    waiting += survey.parents[value]
        lengths: dict[Value, tuple[int, int]] = {}
        for value in sorted(self.values):  # parents first
            if value < started:
                lengths[value] = (0, 0)
                continue
            before = [lengths[parent] for parent in survey.parents[value]]
            convolutions, operators = max(before, default=(0, 0))
            lengths[value] = (convolutions + survey.is_convolved[value], operators + 1)
        self.length = lengths[end]  # convolutions, then operators of any kind


def _is_output_within(survey: Survey, started: Value, value: Value) -> bool:
    return any(
        seen.output is not None and seen.output.value == value and seen.started >= started
        for seen in survey.seen.values()
    )
