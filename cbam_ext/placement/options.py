"""What users may ask of a CBAM that is put into a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

# The model gives in_channels; device and dtype are set by model.to().
OPTIONS = (
    "reduction",
    "kernel_size",
    "hidden_channels",
    "mlp_bias",
    "conv_bias",
    "norm_layer",
    "init",
    "gates",
)

# A name instead of a class survives JSON, in which smp's save_pretrained keeps a model's arguments.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batchnorm": nn.BatchNorm2d,
    # Affine, because smp sets the weight and bias of every norm in a decoder.
    "instancenorm": functools.partial(nn.InstanceNorm2d, affine=True),
}


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
