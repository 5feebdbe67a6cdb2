"""A progress bar for what may take longer than a few seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_DELAY = 3.0  # seconds before the bar appears: most work is done by then


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Hands on ``iterable``, with a bar on stderr once that takes long and where tqdm is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from iterable
        return
    yield from tqdm(iterable, desc=description, total=total, delay=_DELAY, leave=False)
