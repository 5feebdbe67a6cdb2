"""How the operators stand to the host side of CUDA: the device of their tensors, its current
stream, errors of launches, and what is left of them.

The emulation refuses a launch where no device guard is alive or that goes to another stream than
the current one, so every emulated test sees these; here it is shown that it does, and that each
launch is asked whether it failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from emulation import Emulation
from emulation import operators as emulated
from support import operators
from support.samples import Problem, draw, same_bits

PROBLEM = Problem((3, 9, 5, 7), 3, 2, biases="12c")


def calls(generator: torch.Generator) -> dict[str, tuple[Any, ...]]:
    arguments = draw(PROBLEM, generator)
    return operators.calls(torch.ops.cbam_emulated, arguments, generator)


def as_list(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.fixture
def device(emulation: None) -> Iterator[Emulation]:
    device = emulated()
    device.configure(l2_bytes=1 << 10)  # several chunks
    yield device
    device.configure()


@pytest.mark.parametrize("name", operators.NAMES)
def test_every_launch_is_asked_whether_it_failed(
    device: Emulation, name: str, generator: torch.Generator
) -> None:
    """Whichever fails, the call says so, launches nothing more and leaves no error and no guard;
    the next call is right."""
    call = calls(generator)[name]
    operator = getattr(torch.ops.cbam_emulated, name)
    with device.record() as recording:
        expected = as_list(operator(*call))
    assert len(recording.launches) > 0
    for place in range(len(recording.launches)):
        with (
            device.record() as failed,
            device.failing_call(place),
            pytest.raises(RuntimeError, match="cbam: .*: invalid configuration argument"),
        ):
            operator(*call)
        assert len(failed.launches) == place
        assert (device.left_error, device.scopes) == (0, 0)
        for one, other in zip(expected, as_list(operator(*call)), strict=True):
            assert same_bits(one, other)


def test_nothing_fails_where_no_call_was_told_to(
    device: Emulation, generator: torch.Generator
) -> None:
    call = calls(generator)["forward"]
    with device.record() as recording:
        torch.ops.cbam_emulated.forward(*call)
    with device.failing_call(len(recording.launches)):
        torch.ops.cbam_emulated.forward(*call)


def test_no_guard_is_left(device: Emulation, generator: torch.Generator) -> None:
    """Neither by calls nor by errors, of arguments either; on any thread."""

    def work(call: tuple[Any, ...]) -> int:
        torch.ops.cbam_emulated.forward(*call)
        with pytest.raises(RuntimeError, match="fc1_weight"):
            torch.ops.cbam_emulated.forward(call[0][:, 1:], *call[1:])
        return device.scopes

    call = calls(generator)["forward"]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, [call] * 8)) == [0] * 8
