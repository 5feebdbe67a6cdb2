"""smp itself, for registration and placement."""

from __future__ import annotations

import re
import sys
from types import ModuleType

SMP = "segmentation_models_pytorch"
# Since then a decoder takes its features as one list, and smp lists its architectures.
OLDEST = (0, 5)


def import_smp() -> ModuleType:
    """smp.

    Raises:
        ImportError: it is not installed, or older than what this package knows.
    """
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        if error.name != SMP:
            raise  # smp is there; something that it needs is not
        raise ImportError(
            "cbam_ext.smp needs segmentation_models_pytorch; install it with "
            "`pip install segmentation-models-pytorch`",
            name=SMP,
        ) from error
    numbers = re.match(r"(\d+)\.(\d+)", smp_version())
    if numbers is not None and tuple(map(int, numbers.groups())) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"cbam_ext.smp needs segmentation_models_pytorch {oldest} or newer, and this is "
            f'{smp_version()}; run `pip install -U "segmentation-models-pytorch>={oldest}"`',
            name=SMP,
        )
    return smp


def smp_version() -> str:
    return getattr(sys.modules[SMP], "__version__", "(unknown version)")
