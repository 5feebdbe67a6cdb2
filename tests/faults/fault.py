"""What a fault is, and how it is put into a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Which tests mirror which code: the first path that a file begins with.
_MIRRORS = {
    "csrc/cpu": ("tests/cpu", "tests/ops"),
    "csrc/cuda": ("tests/cuda", "tests/ops"),
    "csrc": ("tests/ops",),
    "setup.py": ("tests/building",),
    "cbam_ext/reference": ("tests/ops",),
    "cbam_ext/functional.py": ("tests/ops",),
    "cbam_ext/module.py": ("tests/module",),
}
# Backends that a fault is not in, by words in the names of tests.
_KEYWORDS = {"csrc/cpu": "not emulated", "csrc/cuda": "emulat or plan or races"}


@dataclass(frozen=True)
class Fault:
    """``search``, which occurs in ``file`` once, becomes ``replacement``."""

    name: str
    file: str
    search: str
    replacement: str
    # Whether the kernels are built anew; those whose sources are in csrc always are.
    builds: bool = False
    # Slow tests that see what no quick one can; these are run instead.
    slow_tests: tuple[str, ...] = ()

    @property
    def rebuilds(self) -> bool:
        return self.builds or self.file.startswith("csrc/")

    @property
    def is_emulated(self) -> bool:
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cpu/")

    @property
    def tests(self) -> tuple[str, ...]:
        """Those that have to see it: by default the folders that mirror the file."""
        if self.slow_tests:
            return self.slow_tests
        for prefix, folders in _MIRRORS.items():
            if self.file.startswith(prefix):
                return folders
        return (f"tests/{self.file.split('/')[1]}",)

    @property
    def keywords(self) -> str:
        """What pytest's -k is given for these tests."""
        if self.slow_tests:
            return ""
        return next((k for prefix, k in _KEYWORDS.items() if self.file.startswith(prefix)), "")


def planted_text(text: str, fault: Fault) -> str:
    """``text`` of the file with the fault in it."""
    if text.count(fault.search) != 1:
        raise ValueError(f"{fault.name}: {text.count(fault.search)} places in {fault.file}, not 1")
    return text.replace(fault.search, fault.replacement)


def misplaced(root: Path, fault: Fault) -> str:
    """Why a fault cannot be planted into the sources as they are; empty if it can."""
    try:
        text = (root / fault.file).read_text()
        unchanged = planted_text(text, fault) == text
    except (OSError, ValueError) as error:
        return str(error)
    return f"{fault.name} changes nothing" if unchanged else ""
