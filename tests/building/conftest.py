"""What tests of builds must not do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cbam_ext.building import decisions

from support.packages import CHECKOUT


def _build_of_the_checkout() -> dict[str, tuple[int, int]]:
    folder = CHECKOUT / "cbam_ext"
    files = [folder / decisions.FACTS, *folder.glob("*.so")]
    found = {path.name: path.stat() for path in files if path.exists()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture(autouse=True)
def the_build_stays() -> Iterator[None]:
    """That of the checkout is what all other tests run on."""
    before = _build_of_the_checkout()
    yield
    assert _build_of_the_checkout() == before
