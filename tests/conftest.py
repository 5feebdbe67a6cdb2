"""What all tests share: the seed of the run, the backends, and modes set from outside.

CBAM_TEST_SEED           repeats a run: the seed stands in the header of every report.
CBAM_TEST_DETERMINISTIC  1 runs everything under torch.use_deterministic_algorithms(True), which
                         also fills fresh memory with NaN: a result that was never written shows.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Through the environment the workers of a parallel run and the tests' own subprocesses inherit it.
SEED = int(os.environ.setdefault("CBAM_TEST_SEED", str(random.SystemRandom().randrange(2**31))))

import pytest  # noqa: E402
import torch  # noqa: E402

import cbam_ext  # noqa: E402  (loads the operators)


@dataclass(frozen=True)
class Backend:
    """Where the operators under test live: a device, and a namespace with the operators of cbam."""

    name: str
    device: torch.device
    namespace: str = "cbam"

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)


def backends() -> list[Backend]:
    """Every backend this machine can run; its name stands in the ids of the tests."""
    found = [Backend("cpu", torch.device("cpu"))]
    if torch.cuda.is_available() and cbam_ext.ops.has_kernels("cuda"):
        found.append(Backend("cuda", torch.device("cuda")))
    return found


def pytest_configure(config: pytest.Config) -> None:
    torch.use_deterministic_algorithms(os.environ.get("CBAM_TEST_DETERMINISTIC") == "1")


def pytest_report_header(config: pytest.Config) -> list[str]:
    names = ", ".join(backend.name for backend in backends())
    deterministic = torch.are_deterministic_algorithms_enabled()
    return [
        f"cbam_ext {cbam_ext.__version__} in {os.path.dirname(cbam_ext.__file__)}",
        f"torch {torch.__version__}, backends: {names}, deterministic algorithms: {deterministic}",
        f"repeat with CBAM_TEST_SEED={SEED}",
    ]


@pytest.fixture(params=backends(), ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param
    if not hasattr(backend.ops, "forward"):
        # Not skipped: a suite without the thing it tests must not look green.
        pytest.fail("the compiled part of cbam_ext is missing; see `python -m cbam_ext`")
    return backend


@pytest.fixture(autouse=True)
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """The test's own random numbers: they depend on the run's seed and the test's name only."""
    seed = SEED + zlib.crc32(request.node.name.encode())
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
