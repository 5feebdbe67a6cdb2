"""The example that several files test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from support.packages import CHECKOUT

EXAMPLES = CHECKOUT / "examples"


@pytest.fixture(scope="session")
def program() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import placement_study

        yield placement_study
    finally:
        sys.path[:] = [path for path in sys.path if path != str(EXAMPLES)]
