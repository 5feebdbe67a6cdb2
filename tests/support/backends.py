"""The seed of the run, and the backends that its tests run on."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import cbam_ext

from . import instruction_sets

# Through the environment the workers of a parallel run and the tests' own subprocesses inherit it.
SEED = int(os.environ.setdefault("CBAM_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


@dataclass(frozen=True)
class Backend:
    """Where the operators under test live: a device, and a namespace with the operators of cbam."""

    name: str
    device: torch.device
    namespace: str = "cbam"
    isa: str | None = None  # the instruction set to run on; None: the one in use

    @property
    def family(self) -> str:
        """What marks call it: one name for all instruction sets."""
        return self.name.partition("-")[0]

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)

    @property
    def emulated(self) -> bool:
        """Whether every call takes a hundred times longer than elsewhere."""
        return self.name == "emulated"


def _all_backends() -> Iterator[Backend]:
    cpu = torch.device("cpu")
    yield Backend("cpu", cpu)
    for name in reversed(instruction_sets.NUMBERS):
        yield Backend(f"cpu-{name}", cpu, isa=name)
    yield Backend("emulated", cpu, "cbam_emulated")
    yield Backend("cuda", torch.device("cuda"))


BACKENDS = {backend.name: backend for backend in _all_backends()}


def backends() -> list[Backend]:
    """The backends of this run; the name of each stands in the ids of its tests."""
    wish = os.environ.get("CBAM_TEST_BACKENDS", "")
    names = {name for name in wish.replace(" ", "").split(",") if name}
    if names - BACKENDS.keys():
        raise pytest.UsageError(f"CBAM_TEST_BACKENDS={wish}: there are {', '.join(BACKENDS)}")
    if not names:
        names = {"cpu", "emulated", *(f"cpu-{isa}" for isa in instruction_sets.others())}
        if torch.cuda.is_available() and cbam_ext.ops.has_kernels("cuda"):
            names.add("cuda")
    return [backend for name, backend in BACKENDS.items() if name in names]


def gpu_is_lost() -> bool:
    """Whether this process has met an error, such as an illegal access, that CUDA never forgets."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
