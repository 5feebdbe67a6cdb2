"""CBAM in the decoders of segmentation_models_pytorch (smp).

>>> import segmentation_models_pytorch as smp
>>> import cbam_ext.smp
>>> cbam_ext.smp.register()
>>> model = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="cbam")

``smp.Unet``, ``smp.UnetPlusPlus`` and ``smp.create_model`` then accept "cbam", or a dict with the
options of :class:`cbam_ext.CBAM`, such as ``{"type": "cbam", "reduction": 8, "norm_layer":
"batchnorm"}``. Importing this module registers nothing and does not need smp.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .module import CBAM

__all__ = ["prune_unused", "register", "unregister"]

_SMP = "segmentation_models_pytorch"

# What a dict may hold beside "type". smp gives in_channels; device and dtype are set by model.to().
_OPTIONS = (
    "reduction",
    "kernel_size",
    "hidden_channels",
    "mlp_bias",
    "conv_bias",
    "norm_layer",
)

# A name instead of a class survives the JSON in which save_pretrained keeps a model's arguments.
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batchnorm": nn.BatchNorm2d,
    # Affine, because smp sets the weight and bias of every norm in a decoder.
    "instancenorm": functools.partial(nn.InstanceNorm2d, affine=True),
}


def register() -> None:
    """Makes smp accept ``decoder_attention_type="cbam"`` and its dict form.

    The dict is ``{"type": "cbam"}`` plus any of ``reduction``, ``kernel_size``,
    ``hidden_channels``, ``mlp_bias``, ``conv_bias`` and ``norm_layer``: None, a name ("batchnorm",
    "instancenorm"), or a class or function as in :class:`cbam_ext.CBAM`. With a name the dict is
    plain JSON, so that ``save_pretrained`` and ``from_pretrained`` carry it; the arguments of a
    model built with a class are not saved, so smp cannot load that model again.

    Everything else that smp accepts or refuses stays as it was. A process that loads a saved model
    by ``from_pretrained`` has to register first. Repeated calls change nothing; where smp has a
    "cbam" of its own, that one stays, with a warning.

    Raises:
        ImportError: segmentation_models_pytorch is not installed.
        RuntimeError: this version of smp builds its attention in a way unknown here.
    """
    # The method is replaced, not the class: smp refers to the class by two names, and models that
    # were built before could not be pickled if it changed.
    attention = _import_smp().base.modules.Attention
    if _is_ours(attention.__init__):
        return
    _check_signature(attention)
    if _accepts_cbam(attention):
        warnings.warn(
            f'segmentation_models_pytorch {_version()} already accepts "cbam"; '
            "cbam_ext.smp.register() leaves it alone.",
            UserWarning,
            stacklevel=2,
        )
        return
    attention.__init__ = _with_cbam(attention.__init__)


def unregister() -> None:
    """Undoes any number of calls of :func:`register`; models built in between keep working."""
    smp = sys.modules.get(_SMP)
    if smp is None:
        return
    attention = smp.base.modules.Attention
    if _is_ours(attention.__init__):
        attention.__init__ = attention.__init__.__wrapped__


def prune_unused(model: nn.Module) -> nn.Module:
    """Replaces the attention that smp builds but never runs by ``nn.Identity``, in place.

    A decoder block of ``smp.Unet`` or ``smp.UnetPlusPlus`` runs its ``attention1`` after joining
    its input with a skip connection, and the last block has none. The parameters of that
    ``attention1`` ("cbam" or "scse") never get a gradient, for which DistributedDataParallel
    raises an error in the second step. Call this before an optimiser or DDP takes the parameters.

    It removes the keys of these parameters from ``state_dict()``. So prune a model before it loads
    a checkpoint of a pruned one; after ``save_pretrained``, load with
    ``smp.from_pretrained(folder, strict=False)``, which builds the unpruned model, and prune that.

    Args:
        model: a model of smp, or any module that contains one.

    Returns:
        ``model``, unchanged if it has no such attention or was pruned before.

    Raises:
        ImportError: segmentation_models_pytorch is not installed.
        TypeError: there is no model of smp in ``model``.
    """
    smp = _import_smp()
    if not isinstance(model, nn.Module) or not any(
        isinstance(module, smp.base.SegmentationModel) for module in model.modules()
    ):
        raise TypeError(
            "prune_unused: model must be a model of segmentation_models_pytorch or contain one, "
            f"got {type(model).__name__}"
        )
    for block in _blocks_without_skip(model):
        if any(True for _ in block.attention1.parameters()):
            block.attention1 = nn.Identity()
    return model


def _blocks_without_skip(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder blocks that are never called with a skip connection.

    That is decided by how a decoder's forward walks its blocks, not by channels: encoders without
    a stage at half resolution hand over an empty skip of 0 channels, and then attention1 does run.
    """
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
    from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder

    for module in model.modules():
        if isinstance(module, UnetDecoder):
            yield module.blocks[-1]
        elif isinstance(module, UnetPlusPlusDecoder):
            yield module.blocks[f"x_0_{module.depth}"]


def _with_cbam(original: Callable[..., None]) -> Callable[..., None]:
    """``Attention.__init__`` that builds our attention where it is asked for."""

    @functools.wraps(original)
    def __init__(self: nn.Module, name: Any, **params: Any) -> None:
        options = _cbam_options(name)
        if options is None:
            original(self, name, **params)
            return
        original(self, None, **params)
        self.attention = CBAM(**params, **options)

    # The mark names its bearer, because a wrapper that somebody puts around this one copies it.
    __init__._cbam_ext_mark = __init__
    return __init__


def _is_ours(function: Callable[..., None]) -> bool:
    return getattr(function, "_cbam_ext_mark", None) is function


def _cbam_options(name: Any) -> dict[str, Any] | None:
    """The options of CBAM that ``name`` asks for, or None where it asks for something else."""
    if isinstance(name, str) and name == "cbam":
        return {}
    if not isinstance(name, Mapping) or name.get("type") != "cbam":
        return None
    options = {key: value for key, value in name.items() if key != "type"}
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise ValueError(
            f"decoder_attention_type: unknown option {', '.join(map(repr, unknown))} of "
            f'{{"type": "cbam"}}; known are {", ".join(_OPTIONS)}'
        )
    if isinstance(options.get("norm_layer"), str):
        options["norm_layer"] = _norm_by_name(options["norm_layer"])
    return options


def _norm_by_name(name: str) -> Callable[[int], nn.Module]:
    if name not in _NORMS:
        raise ValueError(
            f"decoder_attention_type: unknown norm_layer {name!r}; known are {', '.join(_NORMS)}, "
            "None, or a class such as torch.nn.BatchNorm2d"
        )
    return _NORMS[name]


def _import_smp() -> ModuleType:
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        if error.name != _SMP:
            raise  # smp is there; something that it needs is not
        raise ImportError(
            "cbam_ext.smp needs segmentation_models_pytorch; install it with "
            "`pip install segmentation-models-pytorch`",
            name=_SMP,
        ) from error
    return smp


def _version() -> str:
    return getattr(sys.modules[_SMP], "__version__", "(unknown version)")


def _check_signature(attention: type[nn.Module]) -> None:
    signature = inspect.signature(attention.__init__)
    found = [(p.name, p.kind) for p in signature.parameters.values()]
    plain, keywords = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD
    if found != [("self", plain), ("name", plain), ("params", keywords)]:
        raise RuntimeError(
            "cbam_ext.smp.register() knows segmentation_models_pytorch.base.modules.Attention with "
            f"__init__(self, name, **params), but version {_version()} has __init__{signature}; "
            "install a version that fits, such as segmentation-models-pytorch==0.6.0"
        )


def _accepts_cbam(attention: type[nn.Module]) -> bool:
    try:
        with torch.device("meta"):  # leaves the random state alone
            attention("cbam", in_channels=16)
    except Exception:
        return False
    return True
