"""Makes smp's own classes take CBAM: ``decoder_attention_type="cbam"`` and ``cbam=``."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import (
    logit_of_channel_gate,
    logit_of_spatial_gate,
    open_channel_gate,
    open_spatial_gate,
)
from ..module import CBAM
from ..placement import resolve_options
from . import placement
from .options import SMP, import_smp, smp_version

# How gates in smp's decoder blocks begin: there are ten of them in a Unet, and what each quarters,
# the next one quarters again.
START = "identity"


def register() -> None:
    """Makes smp accept ``decoder_attention_type="cbam"`` and, for every architecture, ``cbam=``.

    ``decoder_attention_type`` of ``smp.Unet`` and ``smp.UnetPlusPlus`` takes "cbam" or the dict
    ``{"type": "cbam"}`` plus any of ``reduction``, ``kernel_size``, ``hidden_channels``,
    ``mlp_bias``, ``conv_bias``, ``init`` and ``norm_layer``: None, a name ("batchnorm",
    "instancenorm"), or a class or function as in :class:`cbam_ext.CBAM`. With a name the dict is
    plain JSON, so that ``save_pretrained`` and ``from_pretrained`` carry it; the arguments of a
    model built with a class are not saved, so smp cannot load that model again. The other
    architectures have no such attention and smp ignores the argument; now it is a ValueError.

    Here gates begin open, as by ``init="identity"``, unless the dict has another ``init``; there
    are ten CBAMs in the decoder of a Unet. ``{"type": "cbam", "init": "default"}`` has the start
    of the paper, and no biases. smp initialises every layer of a decoder again once it is built;
    layers of a CBAM get smp's weights by that, but open gates stay open. A checkpoint of CBAMs
    without biases is loaded into CBAMs with them, as what it computed, with a warning.

    ``cbam`` is for all architectures: the ``where`` of :func:`add_cbam`, or a dict of its
    arguments, as in ``smp.FPN("resnet18", cbam={"where": "skips", "reduction": 8})``.

    A checkpoint with CBAMs that is loaded into a model without their places, as
    ``from_pretrained`` may do where it is not strict, is loaded with a warning that names them.

    Everything else that smp accepts or refuses stays as it was. A process that loads a saved model
    by ``from_pretrained`` has to register first. Repeated calls change nothing; where smp has a
    "cbam" of its own, that one stays, with a warning.

    Raises:
        ImportError: segmentation_models_pytorch is not installed, or older than 0.5.
        RuntimeError: this version of smp builds its attention in a way unknown here.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> register()
        >>> model = smp.create_model("fpn", "resnet18", encoder_weights=None, cbam="skips")
        >>> unregister()
    """
    smp = import_smp()
    _register_attention(smp.base.modules.Attention)
    for architecture in _architectures(smp):
        if not _is_ours(architecture.__init__):
            architecture.__init__ = _with_placement(architecture.__init__)
    base = smp.base.SegmentationModel
    if not _is_ours(base.load_state_dict):
        base.load_state_dict = _telling_of_lost(base.load_state_dict)
    starts = smp.base.initialization
    if not _is_ours(starts.initialize_decoder):
        starts.initialize_decoder = _leaving_gates_open(starts.initialize_decoder)


def unregister() -> None:
    """Undoes any number of calls of :func:`register`; models built in between keep working.

    Example:
        >>> register()
        >>> unregister()
    """
    smp = sys.modules.get(SMP)
    if smp is None or not hasattr(smp, "MODEL_ARCHITECTURES_MAPPING"):  # too old to register
        return
    attention = smp.base.modules.Attention
    for patched in (attention, *_architectures(smp)):
        if _is_ours(patched.__init__):
            patched.__init__ = patched.__init__.__wrapped__
    if _is_ours(attention._load_from_state_dict):
        del attention._load_from_state_dict  # its class has none of its own
    base = smp.base.SegmentationModel
    if _is_ours(base.load_state_dict):
        base.load_state_dict = base.load_state_dict.__wrapped__
    starts = smp.base.initialization
    if _is_ours(starts.initialize_decoder):
        starts.initialize_decoder = starts.initialize_decoder.__wrapped__


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
        ImportError: segmentation_models_pytorch is not installed, or older than 0.5.
        TypeError: there is no model of smp in ``model``.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> model = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="scse")
        >>> prune_unused(model).decoder.blocks[-1].attention1
        Identity()
    """
    smp = import_smp()
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


def _architectures(smp: ModuleType) -> list[type[nn.Module]]:
    """Those with an ``__init__`` of their own; another one's is patched with its owner."""
    known = smp.MODEL_ARCHITECTURES_MAPPING.values()
    return [architecture for architecture in known if "__init__" in vars(architecture)]


def _with_placement(original: Callable[..., None]) -> Callable[..., None]:
    """An architecture's ``__init__`` that calls ``add_cbam`` where it is given ``cbam``."""
    has_attention = "decoder_attention_type" in inspect.signature(original).parameters

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **params: Any) -> None:
        if not has_attention and params.get("decoder_attention_type") is not None:
            name = type(self).__name__
            raise ValueError(
                f"decoder_attention_type: {name} has no attention in its decoder, and smp would "
                f'ignore this. Call cbam_ext.smp.add_cbam(model) or pass cbam="encoder" to {name}. '
                "To load a model that was saved with it, pass decoder_attention_type=None to "
                "from_pretrained"
            )
        cbam = params.pop("cbam", None)
        original(self, *args, **params)
        if cbam is not None:
            placement.from_keyword(self, cbam)

    return _mark(__init__)


def _telling_of_lost(original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_state_dict`` that warns of CBAMs which have no place in the model.

    Strict, it raises by itself; but from_pretrained need not be strict, and does not say what it
    left out.
    """

    @functools.wraps(original)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], **options: Any) -> Any:
        held = _cbams_of(state_dict)
        result = original(self, state_dict, **options)
        own = self.state_dict()
        lost = sorted(held - _cbams_of(own))
        if lost:
            warnings.warn(
                f"CBAMs of this checkpoint have no place in this {type(self).__name__} and were "
                f"left out: {', '.join(lost)}. Build the model with them before it loads, by "
                "cbam_ext.smp.add_cbam, cbam= or decoder_attention_type=; an __init__ without "
                "**kwargs does not take these from a saved config",
                UserWarning,
                stacklevel=2,
            )
        # One that loses its biases computes something else.
        bare = sorted(name for name in held - {*lost} if _biases_of(name, state_dict) - {*own})
        if bare:
            warnings.warn(
                f"CBAMs of this checkpoint have biases, which this {type(self).__name__} lacks and "
                f"which were left out: {', '.join(bare)}. Build the model as it was built, without "
                '"init": "default" in decoder_attention_type=',
                UserWarning,
                stacklevel=2,
            )
        return result

    return _mark(load_state_dict)


def _cbams_of(state: Mapping[str, Any]) -> set[str]:
    """The names of the CBAMs in a state dict."""
    ends = (".channel.fc1.weight", ".spatial.conv.weight")  # either gate may stand alone
    return {name.removesuffix(end) for end in ends for name in state if name.endswith(end)}


def _biases_of(name: str, state: Mapping[str, Any]) -> set[str]:
    """The keys of the biases of one CBAM."""
    found = {f"{name}.{layer}.bias" for layer in ("channel.fc1", "channel.fc2", "spatial.conv")}
    return found & state.keys()


def _register_attention(attention: type[nn.Module]) -> None:
    # The method is replaced, not the class: smp refers to the class by two names, and models that
    # were built before could not be pickled if it changed.
    if _is_ours(attention.__init__):
        return
    _check_signature(attention)
    if _accepts_cbam(attention):
        warnings.warn(
            f'segmentation_models_pytorch {smp_version()} already accepts "cbam"; '
            "cbam_ext.smp.register() leaves it alone.",
            UserWarning,
            stacklevel=3,
        )
        return
    attention.__init__ = _with_cbam(attention.__init__)
    attention._load_from_state_dict = _with_absent_biases(attention._load_from_state_dict)


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

    return _mark(__init__)


def _leaving_gates_open(original: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """smp's ``initialize_decoder``, after which gates that were opened are so again.

    It is asked of the gates themselves, not of how they were built: one that has learnt since is
    initialised like everything else.
    """

    @functools.wraps(original)
    def initialize_decoder(module: nn.Module) -> None:
        cbams = [each for each in module.modules() if isinstance(each, CBAM)]
        channels = [(each.channel, logit_of_channel_gate(each.channel)) for each in cbams]
        spatials = [(each.spatial, logit_of_spatial_gate(each.spatial)) for each in cbams]
        original(module)
        for channel, logit in channels:
            open_channel_gate(channel, logit)
        for spatial, logit in spatials:
            open_spatial_gate(spatial, logit)

    return _mark(initialize_decoder)


def _with_absent_biases(original: Callable[..., None]) -> Callable[..., None]:
    """``Attention._load_from_state_dict``, for which no bias is a bias of zero.

    "cbam" built CBAMs without biases once. What was saved then is loaded as what it computed, and
    not into gates that biases of this model hold open.
    """

    @functools.wraps(original)
    def _load_from_state_dict(
        self: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        absent = _absent_biases(self, state_dict, f"{prefix}attention.")
        if absent:
            warnings.warn(
                "this checkpoint is of CBAMs without biases, as decoder_attention_type="
                '"cbam" built them when their gates began closed by half. Loaded with biases of '
                'zero, they compute the same; {"type": "cbam", "init": "default"} builds them '
                "without",
                UserWarning,
                stacklevel=2,
            )
        state_dict.update(absent)
        original(self, state_dict, prefix, *others)

    return _mark(_load_from_state_dict)


def _absent_biases(
    attention: nn.Module, state_dict: Mapping[str, Any], prefix: str
) -> dict[str, Tensor]:
    """Zeros for all biases of a CBAM, where the ``state_dict`` has its weights alone."""
    cbam = attention.attention
    if not isinstance(cbam, CBAM):
        return {}
    layers = {
        name: layer
        for name, layer in cbam.named_modules(prefix=prefix[:-1])
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    if any(f"{name}.bias" in state_dict for name in layers):
        return {}
    return {
        f"{name}.bias": state_dict[f"{name}.weight"].new_zeros(len(layer.bias))
        for name, layer in layers.items()
        if layer.bias is not None and f"{name}.weight" in state_dict
    }


def _mark(function: Callable[..., None]) -> Callable[..., None]:
    # The mark names its bearer, because a wrapper that somebody puts around this one copies it.
    function._cbam_ext_mark = function
    return function


def _is_ours(function: Callable[..., None]) -> bool:
    return getattr(function, "_cbam_ext_mark", None) is function


def _cbam_options(name: Any) -> dict[str, Any] | None:
    """The options of CBAM that ``name`` asks for, or None where it asks for something else."""
    if isinstance(name, str) and name == "cbam":
        return {"init": START}
    if not isinstance(name, Mapping) or name.get("type") != "cbam":
        return None
    options = {key: value for key, value in name.items() if key != "type"}
    return resolve_options("decoder_attention_type", '{"type": "cbam"}', {"init": START, **options})


def _check_signature(attention: type[nn.Module]) -> None:
    signature = inspect.signature(attention.__init__)
    found = [(p.name, p.kind) for p in signature.parameters.values()]
    plain, keywords = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD
    if found != [("self", plain), ("name", plain), ("params", keywords)]:
        raise RuntimeError(
            "cbam_ext.smp.register() knows segmentation_models_pytorch.base.modules.Attention with "
            f"__init__(self, name, **params), but version {smp_version()} has __init__{signature}; "
            "install a version that fits, such as segmentation-models-pytorch==0.6.0"
        )


def _accepts_cbam(attention: type[nn.Module]) -> bool:
    try:
        with torch.device("meta"):  # leaves the random state alone
            attention("cbam", in_channels=16)
    except Exception:
        return False
    return True
