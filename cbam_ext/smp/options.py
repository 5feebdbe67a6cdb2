"""What registration and placement share: smp itself, and CBAM's options as users give them."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

SMP = "segmentation_models_pytorch"
# Since then a decoder takes its features as one list, and smp lists its architectures.
OLDEST = (0, 5)

# smp or add_cbam give in_channels; device and dtype are set by model.to().
OPTIONS = (
    "reduction",
    "kernel_size",
    "hidden_channels",
    "mlp_bias",
    "conv_bias",
    "norm_layer",
)

# A name instead of a class survives the JSON in which save_pretrained keeps a model's arguments.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batchnorm": nn.BatchNorm2d,
    # Affine, because smp sets the weight and bias of every norm in a decoder.
    "instancenorm": functools.partial(nn.InstanceNorm2d, affine=True),
}


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


def resolve_options(argument: str, owner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` as keyword arguments of CBAM: checked, with a named norm looked up.

    ``argument`` names the user's argument in errors, ``owner`` what the options belong to.
    """
    unknown = [key for key in given if key not in OPTIONS]
    if unknown:
        raise ValueError(
            f"{argument}: unknown option {', '.join(map(repr, unknown))} of {owner}; known are "
            f"{', '.join(OPTIONS)}"
        )
    options = dict(given)
    name = options.get("norm_layer")
    if isinstance(name, str):
        if name not in NORMS:
            raise ValueError(
                f"{argument}: unknown norm_layer {name!r}; known are {', '.join(NORMS)}, None, or "
                "a class such as torch.nn.BatchNorm2d"
            )
        options["norm_layer"] = NORMS[name]
    return options
