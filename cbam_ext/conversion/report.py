"""What a conversion did, and why not more."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Converted:
    """A module that was replaced."""

    name: str
    kind: str  # the class that it had
    notes: tuple[str, ...] = ()
    error: float | None = (
        None  # largest difference of outputs, relative, in float64; None: unchecked
    )


@dataclass(frozen=True)
class Left:
    """A module that looks like a CBAM and was left as it is."""

    name: str
    kind: str
    reason: str


@dataclass
class ConversionReport:
    """What :func:`convert` did; ``print`` shows it.

    ``converted`` and ``left`` are in the order of the model, with names as in
    ``model.named_modules()``.
    """

    converted: list[Converted] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)}, left {len(self.left)}"]
        for done in self.converted:
            error = "" if done.error is None else f", outputs differ by {done.error:.0e}"
            notes = "".join(f"; {note}" for note in done.notes)
            lines.append(f"  {shown(done.name)}: was {done.kind}{error}{notes}")
        for left in self.left:
            lines.append(f"  {shown(left.name)}: {left.kind} left alone: {left.reason}")
        return "\n".join(lines)


def shown(name: str) -> str:
    """The name of a module in the model."""
    return name or "(the model itself)"
