"""``python -m bench.endurance``: a day of use in miniature.

100,000 calls of random problems from 8 threads, forward and backward, some with bad arguments in
between. One in some calls is compared with the definition in float64, and memory has to stay what
it was after the first fifth. Every call has its own seed: what fails is tried alone with
--first NUMBER --calls 1 --threads 1.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import cbam_ext
from cbam_ext._progress import track

from .exercise import LIMITS
from .measure import DTYPES

Operator = Callable[..., Tensor]

CHECKED = 25  # one call in so many is compared with the definition
WRONG = 20  # one in so many has bad arguments
ROUNDS = 20  # after each of them memory is counted, while no call runs
SETTLING = ROUNDS // 5  # rounds until memory is what it will be
# Bytes that memory may grow by after that: the heap differs from count to count by some of it; a
# tensor that each call leaves behind is a multiple.
MOST_GROWTH = 16 << 20
_M_ARENA_MAX = -8  # of glibc's mallopt


@dataclass
class Result:
    """How a run went."""

    calls: int = 0
    checked: int = 0
    refused: int = 0
    memory: list[int] = field(default_factory=list)  # bytes, after each round
    complaints: list[str] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Of memory since it had settled."""
        settled = self.memory[SETTLING - 1 :]
        return settled[-1] - min(settled) if settled else 0


@dataclass(frozen=True)
class Outcome:
    """Of one call."""

    checked: bool = False
    refused: bool = False
    complaint: str = ""


def endure(
    calls: int,
    threads: int = 8,
    device: str = "cpu",
    first: int = 0,
    operator: Operator | None = None,
) -> Result:
    """Makes so many calls, numbered from ``first``, of ``torch.ops.cbam.forward``."""
    operator = operator or torch.ops.cbam.forward
    _use_one_heap()
    result = Result()
    numbers = [range(i, first + calls, ROUNDS) for i in range(first, first + ROUNDS)]
    with ThreadPoolExecutor(threads) as pool:
        for round_ in track(numbers, f"{calls} calls", ROUNDS):
            for outcome in pool.map(lambda n: make_call(operator, n, device), round_):
                result.calls += 1
                result.checked += outcome.checked
                result.refused += outcome.refused
                if outcome.complaint:
                    result.complaints.append(outcome.complaint)
            result.memory.append(memory_in_use(device))
            if len(result.complaints) > 10:
                break
    if result.growth > MOST_GROWTH:
        result.complaints.append(f"memory grew by {result.growth / 2**20:.0f} MiB")
    return result


def make_call(operator: Operator, number: int, device: str) -> Outcome:
    """One call with gradients, of a problem that its number decides."""
    generator = torch.Generator().manual_seed(number)
    arguments, grad_output = draw(generator)
    sizes, dtype = tuple(arguments[0].shape), arguments[0].dtype
    name = f"call {number} ({'x'.join(map(str, sizes))} {dtype})"
    given = [t.to(device) for t in arguments]
    if number % WRONG == 1:
        try:
            operator(given[0], given[1][:, :-1], *given[2:])
        except RuntimeError as error:
            known = "fc1_weight must have shape" in str(error)
            return Outcome(refused=known, complaint="" if known else f"{name}: {error}")
        return Outcome(complaint=f"{name}: a wrong shape was taken")
    try:
        found = results(operator, given, grad_output.to(device))
    except RuntimeError as error:
        return Outcome(complaint=f"{name}: {error}")
    if number % CHECKED:
        return Outcome()
    exact = [t.double() for t in arguments]
    expected = results(cbam_ext.reference.cbam, exact, grad_output.double())
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        distance = float((one.cpu().double() - other).norm() / other.norm().clamp_min(1e-3))
        if not distance < LIMITS[dtype]:
            return Outcome(True, complaint=f"{name}: result {i} is off by {distance:.2g}")
    return Outcome(True)


def results(operator: Operator, arguments: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    output = operator(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def draw(generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Arguments of the operator on the CPU, and a gradient of the output."""

    def between(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    def normal(*shape: int, scale: float = 1) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=wide)

    dtype = list(DTYPES.values())[between(0, len(DTYPES) - 1)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Small ones mostly, and some that threads share out.
    most = 6 if between(0, 3) else 48
    n, c, h, w = between(1, 4), between(2, 70), between(1, most), between(1, most)
    hidden, kernel = between(1, 8), 2 * between(0, 4) + 1
    format = torch.channels_last if between(0, 1) else torch.contiguous_format
    x, grad_output = (
        normal(n, c, h, w).to(dtype).contiguous(memory_format=format) for _ in range(2)
    )
    parameters = [
        normal(hidden, c, scale=c**-0.5),
        normal(hidden),
        normal(c, hidden, scale=0.3),
        normal(c),
        normal(1, 2, kernel, kernel, scale=1 / kernel),
        normal(1),
    ]
    return [x, *parameters], grad_output


def _use_one_heap() -> None:
    """For all threads: what one of them frees, others take.

    Each with a heap of its own they leave holes that grow for thousands of calls, of any program.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def memory_in_use(device: str) -> int:
    """Bytes of the GPU's allocator, or of this process once its heaps gave back what is free."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.endurance", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    result = endure(**vars(parser.parse_args(arguments)))
    print(*result.complaints, sep="\n", file=sys.stderr)
    print(
        f"{result.calls} calls, {result.refused} of them refused as they had to be, "
        f"{result.checked} compared; memory grew by {result.growth / 2**20:.1f} MiB"
    )
    return 1 if result.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
