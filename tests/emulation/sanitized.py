"""Runs the emulated operators on a few problems, in a process that has the sanitizers loaded.

From the checkout: ``python tests/emulation/sanitized.py`` starts that process by itself. Problems
are small on purpose: a pixel, a few rows, sizes one beyond a vector, tensors that begin in the
middle of a vector. Every tensor is an allocation of its own, so that a step beyond it is seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402

import cbam_ext  # noqa: E402

from emulation import Emulation, build, exercise  # noqa: E402
from emulation.build import Build  # noqa: E402
from emulation.control import ORDERS  # noqa: E402
from support import samples  # noqa: E402
from support.samples import Arguments, Problem  # noqa: E402

SHAPES = [(1, 1, 1, 1), (2, 9, 5, 7), (3, 16, 4, 8), (2, 33, 9, 17), (1, 70, 12, 12)]


def problems() -> list[Problem]:
    found = list(samples.FEW)
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(samples.DTYPES):
            layout = ("nchw", "nhwc")[(i + j) % 2]
            kernel = (3, 7, 1, 5)[(i + j // 2) % 4]
            found.append(Problem(shape, kernel, 2 + i % 2, dtype, layout, biases="12c"))
    return found


def run(problem: Problem, misaligned: bool, generator: torch.Generator) -> None:
    arguments = samples.draw(problem, generator)
    if misaligned:
        arguments = arguments._replace(input=_one_element_further(arguments.input))
    expected = samples.truth(arguments)
    leaves = Arguments(*(t if t is None else t.detach().requires_grad_() for t in arguments))
    output = torch.ops.cbam_emulated.forward(*leaves)
    samples.assert_close(output.detach(), expected.output, "output")
    for wanted in (leaves, leaves[:1], leaves[1:4], leaves[5:]):
        present = [leaf for leaf in wanted if leaf is not None]
        if not present:
            continue
        upstream = samples.draw_like(output, generator)
        gradients = torch.autograd.grad(output, present, upstream, retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
    for name, results in exercise.run_all(torch.ops.cbam_emulated, arguments, generator).items():
        if name == "_logits" and arguments.conv_weight is None:
            results = results[:1]  # the logits of a gate that is not there are infinite
        assert all(result.isfinite().all() for result in results)


def _one_element_further(x: torch.Tensor) -> torch.Tensor:
    flat = x.new_empty(x.numel() + 1)
    return flat[1:].as_strided(x.size(), x.stride(), 1).copy_(x)


def main() -> None:
    if os.environ.get("CBAM_EMULATION_SANITIZE") != "1":
        build.build(Build.SANITIZED)
        command = [sys.executable, __file__]
        sys.exit(subprocess.run(command, env=build.sanitizer_environment()).returncode)
    build.load()
    cbam_ext.ops.register("cbam_emulated")
    device = Emulation(build.loaded_path())
    device.configure(multiprocessors=2, l2_bytes=1 << 12)  # several chunks
    seed = int(os.environ.get("CBAM_TEST_SEED", "0"))
    generator = torch.Generator().manual_seed(seed)
    torch.set_num_threads(1)
    for i, problem in enumerate(problems()):
        with device.order(ORDERS[i % len(ORDERS)], seed):
            run(problem, misaligned=i % 4 == 3, generator=generator)
    print(f"{len(problems())} problems, no complaint")


if __name__ == "__main__":
    main()
