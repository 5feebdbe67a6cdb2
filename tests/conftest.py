"""What all tests share: the seed of the run, the backends, and modes set from outside.

CBAM_TEST_SEED           repeats a run: the seed stands in the header of every report.
CBAM_TEST_BACKENDS       which backends run, as in "cpu,emulated". Unset, all that this machine can:
                           cpu          the CPU kernels as users get them: on the best instruction
                                        set, or the one that CBAM_CPU_ISA names
                           cpu-avx512, cpu-avx2, cpu-generic
                                        the same kernels on the other sets that the machine has,
                                        for tests with the mark every_isa
                           emulated     the CUDA kernels emulated on the CPU (tests/emulation,
                                        compiled when first needed)
                           cuda         the CUDA kernels
CBAM_TEST_DETERMINISTIC  1 runs everything under torch.use_deterministic_algorithms(True), which
                         also fills fresh memory with NaN: a result that was never written shows.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("support")  # before it is imported

import cbam_ext  # noqa: E402

from support import instruction_sets  # noqa: E402
from support.backends import SEED, Backend, backends, gpu_is_lost  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "on(*names): the backends that the test says something of; cpu: all its sets"
    )
    config.addinivalue_line(
        "markers", "every_isa: the test exercises kernels, so that each instruction set has to pass"
    )
    config.addinivalue_line(
        "markers", "emulate(one_in): runs one in so many of the test's parameters when emulated"
    )
    config.addinivalue_line("markers", "one_quick: the test is slow but for one of its parameters")
    if os.environ.get("CBAM_TEST_DETERMINISTIC") == "1":  # to say no imports the whole compiler too
        torch.use_deterministic_algorithms(True)


def pytest_report_header(config: pytest.Config) -> list[str]:
    names = ", ".join(backend.name for backend in backends())
    deterministic = torch.are_deterministic_algorithms_enabled()
    return [
        f"cbam_ext {cbam_ext.__version__} in {os.path.dirname(cbam_ext.__file__)}",
        f"torch {torch.__version__}, backends: {names}, deterministic algorithms: {deterministic}",
        f"repeat with CBAM_TEST_SEED={SEED}",
    ]


@pytest.hookimpl(tryfirst=True)  # pytest itself then leaves out what is slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the marks ``on``, ``every_isa`` and ``emulate`` say; marks slow what is so
    mostly."""
    # Who asks for a test with its parameters, as in file::test[emulated-0], gets it.
    everything = any("[" in argument for argument in config.args)
    left_out = [item for item in items if _is_left_out(item, everything)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
    _mark_slow([item for item in items if item.get_closest_marker("one_quick")])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Ends a process whose GPU is lost to it, in which every later test would fail.

    A worker of pytest-xdist is replaced by a new one, which goes on behind this test.
    """
    if gpu_is_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process after {item.nodeid}", 1)


def _mark_slow(items: list[pytest.Item]) -> None:
    by_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_one in by_function.values():
        quick = of_one[SEED % len(of_one)]  # many runs see all of them
        for item in of_one:
            if item is not quick:
                item.add_marker("slow")


def _is_left_out(item: pytest.Item, everything: bool) -> bool:
    call = getattr(item, "callspec", None)
    backend = call.params.get("backend") if call else None
    if not isinstance(backend, Backend):
        return False
    on, emulate = item.get_closest_marker("on"), item.get_closest_marker("emulate")
    if on is not None and backend.family not in on.args:
        return True
    if everything:
        return False
    if backend.isa is not None and item.get_closest_marker("every_isa") is None:
        return True
    if emulate is None or not backend.emulated:
        return False
    # Which ones follows the seed, so that many runs see all. Marks say odd numbers, since dtypes
    # and layouts come in fours and twos.
    place = sum(index for name, index in call.indices.items() if name != "backend")
    return (place + SEED) % emulate.kwargs["one_in"] != 0


def seed_of(request: pytest.FixtureRequest) -> int:
    """What is random in a test depends on the run's seed and the test's name only."""
    return SEED + zlib.crc32(request.node.name.encode())


@pytest.fixture(scope="session")
def emulation() -> None:
    """Compiles and loads the emulated operators; once, and so is its failure."""
    from emulation import build

    build.load()
    cbam_ext.ops.register("cbam_emulated")


@pytest.fixture(params=backends(), ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend: Backend = request.param
    # What is missing fails and is not skipped: a suite without the thing it tests must not look
    # green.
    if backend.emulated:
        from emulation import control

        request.getfixturevalue("emulation")
        # A result that depends on the order of blocks, warps or lanes shows over the tests.
        seed = seed_of(request)
        control.operators().set_order(control.ORDERS[seed % len(control.ORDERS)], seed)
    elif not cbam_ext.ops.has_kernels(backend.device.type):
        pytest.fail(cbam_ext.building.library.no_kernel_reason(backend.device.type))
    with instruction_sets.using(backend.isa) if backend.isa else contextlib.nullcontext():
        yield backend


@pytest.fixture(autouse=True)
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """The test's own random numbers: they depend on the run's seed and the test's name only."""
    seed = seed_of(request)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
