"""No operator reads what is before or behind its tensors: each lies against memory that cannot be
touched, in a child process, which would not survive it."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from support.backends import Backend
from support.operators import calls
from support.samples import DTYPES, Problem, draw, same_bits

pytestmark = [pytest.mark.on("cpu"), pytest.mark.every_isa]

PAGE = mmap.PAGESIZE
PROT_NONE = 0

# Rows, channels and hidden units that end amid a vector, fill some, or are less than one.
SHAPES = [(2, 19, 5, 7), (1, 33, 9, 13), (2, 16, 4, 8), (1, 1, 1, 1), (1, 3, 21, 50)]


def against(tensor: Tensor, end: bool) -> Tensor:
    """A copy that ends where a page ends, or begins where one begins, next to one without access.

    The memory is never given back; the process that asks for it does not live long.
    """
    size = tensor.untyped_storage().nbytes()
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for beyond in (address, address + PAGE + room):
        arguments = (ctypes.c_void_p(beyond), ctypes.c_size_t(PAGE), PROT_NONE)
        assert ctypes.CDLL(None).mprotect(*arguments) == 0
    offset = PAGE + room - size if end else PAGE
    flat = torch.frombuffer(
        memory, dtype=tensor.dtype, count=size // tensor.itemsize, offset=offset
    )
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def in_a_child(function: Callable[[mmap.mmap], None]) -> tuple[int, str]:
    """The exit code of a fork that calls the function (negative: the signal that ended it), and
    what that left in the memory it was given."""
    notes = mmap.mmap(-1, PAGE)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the others did not come along
            function(notes)
            code = 0
        except BaseException as error:
            note(notes, f"{notes[:].rstrip(bytes(1)).decode()}: {error!r}")
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), notes[:].rstrip(bytes(1)).decode()


def note(notes: mmap.mmap, text: str) -> None:
    notes[:] = text.encode()[:PAGE].ljust(PAGE, bytes(1))


def as_tensors(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_beside_the_tensors(
    backend: Backend, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    def check(notes: mmap.mmap) -> None:
        for shape in SHAPES:
            problem = Problem(shape, 5, 3, dtype, layout, biases="12c")
            arguments = draw(problem, generator)
            for name, call in calls(backend.ops, arguments, generator).items():
                note(notes, f"{name} of {problem}")
                operator = getattr(backend.ops, name)
                expected = as_tensors(operator(*call))
                for end in (False, True):
                    moved = (against(a, end) if isinstance(a, Tensor) else a for a in call)
                    for one, other in zip(expected, as_tensors(operator(*moved)), strict=True):
                        assert same_bits(one, other)
        note(notes, "done")

    assert in_a_child(check) == (0, "done")


@pytest.mark.parametrize("end", [False, True], ids=["before", "behind"])
def test_a_step_beyond_would_show(end: bool) -> None:
    def check(notes: mmap.mmap) -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # no traceback for what is wanted here
        x = against(torch.ones(3, 5, 7), end)
        ctypes.string_at(x.data_ptr(), x.nbytes)
        note(notes, "inside")
        ctypes.string_at(x.data_ptr() + x.nbytes if end else x.data_ptr() - 1, 1)
        note(notes, "beyond")

    assert in_a_child(check) == (-signal.SIGSEGV, "inside")
