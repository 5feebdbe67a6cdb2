"""Kernels of any size: their tiles shrink, or are read from global memory, and no launch asks for
more shared memory than every GPU gives. (Asking sets a limit of the whole process, which two
threads with kernels of different sizes would take from each other.)"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from cbam_ext import reference

from emulation import operators
from support.samples import Problem, draw, draw_like

USUAL_SHARED = 48 << 10  # bytes that a block may have without asking


@pytest.mark.parametrize("kernel", [1, 3, 7, 9, 13, 31, 49])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_shared_memory_of_every_gpu_is_enough(
    emulation: None, kernel: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    ops: Any = torch.ops.cbam_emulated
    problem = Problem((1, 8, 20, 66), kernel, 2, dtype, biases="12c")
    x, *parameters = draw(problem, generator)
    g = draw_like(x, generator)
    with operators().record() as recording:
        output = ops.forward(x, *parameters)
        ops._backward(g, x, *ops.gates(x, *parameters), *parameters, True, True, True)
    assert max(launch.shared_bytes for launch in recording.kernels) <= USUAL_SHARED
    expected = reference.cbam(x.double(), *(p if p is None else p.double() for p in parameters))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_threads_with_kernels_of_different_sizes(
    emulation: None, generator: torch.Generator
) -> None:
    ops: Any = torch.ops.cbam_emulated
    calls = [draw(Problem((1, 4, 9, 11), kernel, 2), generator) for kernel in (49, 61, 7, 3)]
    expected = [ops.forward(*arguments) for arguments in calls]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: ops.forward(*calls[i % 4]), range(64)))
    for i, output in enumerate(found):
        assert torch.equal(output, expected[i % 4])
