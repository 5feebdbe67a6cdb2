"""CBAM at the places of an smp model that smp itself has no option for.

The CBAMs become submodules of the model's decoder, and two hooks on the decoder call them: one
before it, on the features that it is given, one after it, on its output. So no key of the model's
state_dict moves, and encoder and decoder stay what they are to smp. In the blocks of the encoder
they are placed as in any model (:mod:`cbam_ext.placement`).
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..layers import Init
from ..module import CBAM
from ..placement import (
    NORMS,
    Place,
    Placed,
    check_without,
    find_places,
    forget_compiled_code,
    prepare,
    resolve_options,
    survey_images,
)
from .options import import_smp

_PLACES = ("encoder", "skips", "bottleneck", "decoder", "residual")
_BESIDE_STAGES = ("decoder", "residual")


class StageAttention(nn.ModuleList):
    """One module for each feature map of an encoder: a CBAM, or ``nn.Identity`` for none."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        refined: list[Tensor] = []
        for stage, module in enumerate(self):
            refined.append(module(features[stage]))
        # A new list, because a classification head still reads the old one.
        return refined


# The hooks. Pickled models refer to them by name, and TorchScript compiles them.


def _refined_call(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of a decoder with its features refined, whether they have come by name or by place.

    Without a branch, so that torch.fx can write it down for those without this package.
    """
    others = kwargs.copy()
    named = others.pop(decoder._cbam_argument, None)
    features = (args + (named,))[0]  # noqa: RUF005
    return (decoder.cbam_features(features),) + args[1:], others  # noqa: RUF005


def _also_by_keyword(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook ``hook`` of a decoder for calls by keyword as well, which TorchScript knows not: it
    takes its source from ``hook``."""

    @functools.wraps(hook)
    def refine(decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        if not args and decoder._cbam_argument not in kwargs:
            return None  # forward will say what is missing
        return _refined_call(decoder, args, kwargs)

    refine._by_graph = _refined_call  # type: ignore[attr-defined]
    return refine


@_also_by_keyword
def _refine_features(decoder, args: tuple[list[Tensor]]) -> tuple[list[Tensor]]:  # type: ignore[no-untyped-def]
    return (decoder.cbam_features(args[0]),)


@_also_by_keyword
def _refine_features_beside_tokens(decoder: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """For DPT, whose decoder is given ``(features, prefix_tokens)``."""
    return (decoder.cbam_features(args[0]), *args[1:])


def _refine_output(decoder, args: tuple[list[Tensor]], output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return decoder.cbam_output(output)


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
def add_cbam(
    model: nn.Module,
    where: str | int | Sequence[str | int] = "encoder",
    *,
    init: Init = "default",
    **cbam_options: Any,
) -> nn.Module:
    """Puts CBAM into a model of segmentation_models_pytorch (smp), in place.

    Works for all architectures of smp, before or after training, and keeps every weight and every
    key of the ``state_dict``. The new parameters are ``decoder.cbam_features.<stage>.*`` and
    ``decoder.cbam_output.*``: ``freeze_encoder()`` leaves them trainable. Give them to the
    optimiser, that is, call this before making it. Whatever ``torch.compile`` made in this process
    before is compiled anew, because old code would not call the CBAMs.

    ``model.config`` records the call. In a process that called :func:`register`, the architectures
    take the same as a keyword, ``smp.FPN("resnet18", cbam="skips")`` or ``cbam={"where": "skips",
    "init": "identity", "reduction": 8}``, and that is how ``smp.from_pretrained`` rebuilds what
    ``save_pretrained`` saved.

    Args:
        model: a model of smp. Its encoder hands a list of feature maps to its decoder; stage ``i``
            is the map at 1 / 2^i of the image's resolution, 0 the image itself. A DPT has no
            image in that list: its stages are the transformer blocks that it reads, from 0.
        where: a place or a sequence of places.

            * "encoder": every feature map that the decoder reads, the image excepted.
            * "skips": those but the deepest.
            * "bottleneck": the deepest.
            * "decoder": the decoder's output, which the segmentation head reads.
            * a stage's number.
            * "residual": the end of the residual branch of every block of the encoder that adds
              its input, as the paper has it; see :func:`cbam_ext.add_cbam`. The new parameters are
              ``encoder.*.cbam.*``, which ``freeze_encoder()`` freezes.

            Feature maps that the decoder does not read get no CBAM, whose parameters would have
            no gradient: DeepLabV3Plus reads stages 2 and 5, PSPNet the deepest alone. A
            classification head (``aux_params``) reads the encoder's features as they were.
        init: how the gates begin, as in :class:`cbam_ext.CBAM`; "identity" for a trained model.
        **cbam_options: of :class:`cbam_ext.CBAM`: ``reduction``, ``kernel_size``,
            ``hidden_channels``, ``mlp_bias``, ``conv_bias``, ``norm_layer``; the norm may be
            "batchnorm" or "instancenorm". A model with another norm is saved, but to load it the
            norm has to be given again, as ``from_pretrained(folder, cbam={..., "norm_layer":
            Norm})``.

    Returns:
        ``model``, with CBAMs of the device, dtype and mode of its decoder.

    Raises:
        ImportError: segmentation_models_pytorch is not installed, or older than 0.5.
        TypeError: ``model`` is no model of smp, or an argument has a wrong type.
        ValueError: the place is not there (the message lists what is), the model has CBAMs by
            this function already, or an option is unknown or does not fit ``init``.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> model = smp.DeepLabV3Plus("resnet18", encoder_weights=None)
        >>> model = add_cbam(model, where=["skips", "decoder"], init="identity")
        >>> [name for name, module in model.named_modules() if isinstance(module, CBAM)]
        ['decoder.cbam_features.2', 'decoder.cbam_output']
        >>> model.config["cbam"]
        {'where': ['skips', 'decoder'], 'init': 'identity'}
    """
    decoder = _check_model(model)
    places = _check_where(where)
    options = resolve_options("add_cbam", "CBAM", {**cbam_options, "init": init})
    surroundings = _survey(model)
    stages = _choose_stages(model, places, surroundings)
    in_blocks: list[Place] = []
    if "residual" in places:
        run = functools.partial(survey_images, model.encoder)
        in_blocks = find_places(model.encoder, ["residual"], run)

    make = functools.partial(_make_cbam, decoder=decoder, options=options)
    # All are made before any is placed, so that an error leaves the model as it was.
    at_stages = {stage: make(surroundings.channels[stage]) for stage in stages}
    at_output = make(surroundings.output_channels) if "decoder" in places else None
    at_blocks = prepare(in_blocks, options)
    record = _record(model, where, init, cbam_options)
    handles = {}
    if at_stages:
        decoder.cbam_features = StageAttention(
            at_stages.get(stage, nn.Identity()) for stage in range(len(surroundings.channels))
        ).train(decoder.training)
        decoder._cbam_argument = next(iter(inspect.signature(decoder.forward).parameters))
        hook = _refine_features_beside_tokens if _gives_tokens(model) else _refine_features
        handles["cbam_features"] = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    if at_output is not None:
        decoder.cbam_output = at_output
        handles["cbam_output"] = decoder.register_forward_hook(_refine_output)
    if handles:
        Placed(decoder, handles, record)
    for each in at_blocks:
        each.put(record)
    forget_compiled_code()
    return model


def from_keyword(model: nn.Module, value: Any) -> None:
    """What ``smp.FPN(..., cbam=value)`` does once the model is built: a dict, or a place."""
    if isinstance(value, Mapping):
        add_cbam(model, **value)
    else:
        add_cbam(model, value)


# ------------------------------------------------------------------------------------ arguments


def _check_model(model: nn.Module) -> nn.Module:
    """The decoder of ``model``."""
    smp = import_smp()
    if not isinstance(model, smp.base.SegmentationModel):
        raise TypeError(
            "add_cbam: model must be a model of segmentation_models_pytorch itself, not one "
            f"wrapped, compiled or inside another module; got {type(model).__name__}"
        )
    check_without(model)
    decoder: nn.Module = model.decoder
    return decoder


def _check_where(where: Any) -> list[str | int]:
    several = isinstance(where, Sequence) and not isinstance(where, str)
    places = [_as_place(place) for place in (where if several else [where])]
    for place in places:
        if isinstance(place, bool) or not isinstance(place, str | int):
            raise TypeError(
                f"add_cbam: where must be {_known_places()}, or a list of these, got {where!r}"
            )
        if isinstance(place, str) and place not in _PLACES:
            raise ValueError(f"add_cbam: where must be {_known_places()}, got {place!r}")
    if not places:
        raise ValueError(f"add_cbam: where is empty; name {_known_places()}")
    return places


def _as_place(place: Any) -> Any:
    """A number of another library as an int."""
    if isinstance(place, str | bool) or not hasattr(place, "__index__"):
        return place
    return operator.index(place)


def _known_places() -> str:
    return f"one of {', '.join(map(repr, _PLACES))} or the number of a stage"


# ------------------------------------------------------------------------- what the model has


class _Surroundings(NamedTuple):
    channels: list[int]  # of each feature map
    read: list[int]  # the stages that the decoder reads
    output_channels: int  # of the decoder


def _survey(model: nn.Module) -> _Surroundings:
    """Runs the decoder on the meta device, which computes nothing and changes nothing."""
    encoder, decoder = model.encoder, model.decoder
    channels = list(encoder.out_channels)
    dtype = _placement(decoder)[1]
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers())
    }
    batch, size = 2, 16  # of the deepest map; in training, a norm of 1 x 1 maps needs two samples
    strides = _strides(model)
    sizes = [size * max(strides) // stride for stride in strides]
    with torch.enable_grad():
        features = [
            torch.empty(batch, c, s, s, dtype=dtype, device="meta", requires_grad=True)
            for c, s in zip(channels, sizes, strict=True)
        ]
        arguments: tuple[Any, ...] = (features,)
        if _gives_tokens(model):
            arguments = (features, _prefix_tokens(encoder, features))
        with _without_hooks(decoder):  # they may look at numbers, of which there are none
            output = functional_call(decoder, tensors, arguments)
        gradients = torch.autograd.grad(output.sum(), features, allow_unused=True)
    read = [
        stage
        for stage, gradient in enumerate(gradients)
        # Encoders without a map at half resolution hand over one of 0 channels.
        if gradient is not None and channels[stage] > 0
    ]
    return _Surroundings(channels, read, output.shape[1])


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Without forward hooks; those before a forward stay, by which some set parameters."""
    kept = [(module, module._forward_hooks) for module in model.modules()]
    try:
        for module, _ in kept:
            module._forward_hooks = OrderedDict()
        yield
    finally:
        for module, hooks in kept:
            module._forward_hooks = hooks


def _strides(model: nn.Module) -> list[int]:
    """How much smaller than the image each feature map is."""
    encoder = model.encoder
    if _gives_tokens(model):
        return list(encoder.output_strides)
    return [min(2**stage, encoder.output_stride) for stage in range(len(encoder.out_channels))]


def _gives_tokens(model: nn.Module) -> bool:
    """Whether the encoder is a vision transformer in smp's way, as that of a DPT."""
    return hasattr(model.encoder, "has_prefix_tokens")


def _prefix_tokens(encoder: nn.Module, features: list[Tensor]) -> list[Tensor | None]:
    if not encoder.has_prefix_tokens:
        return [None] * len(features)
    count = encoder._num_prefix_tokens
    return [feature.new_empty(feature.shape[0], count, feature.shape[1]) for feature in features]


def _choose_stages(
    model: nn.Module, places: list[str | int], surroundings: _Surroundings
) -> list[int]:
    read = surroundings.read
    named = {
        "encoder": [stage for stage in read if stage > 0 or not _begins_with_image(model)],
        "bottleneck": read[-1:],
        **dict.fromkeys(_BESIDE_STAGES, ()),
    }
    named["skips"] = named["encoder"][:-1]
    chosen: set[int] = set()
    for place in places:
        stages = named[place] if isinstance(place, str) else [s for s in read if s == place]
        if not stages and place not in _BESIDE_STAGES:
            there = [repr(name) for name in _PLACES if named[name] or name == "decoder"]
            raise ValueError(
                f"add_cbam: {type(model).__name__} with this encoder has no where={place!r}; there "
                f"are {', '.join(there)} and the stages {', '.join(map(str, read))}, which its "
                "decoder reads"
            )
        chosen.update(stages)
    return sorted(chosen)


def _begins_with_image(model: nn.Module) -> bool:
    """Whether stage 0 is the image; VGG has features of that size."""
    encoder = model.encoder
    if _gives_tokens(model):
        return False
    return encoder.out_channels[0] == getattr(encoder, "_in_channels", 3)


# ------------------------------------------------------------------------------------ CBAMs


def _make_cbam(in_channels: int, *, decoder: nn.Module, options: dict[str, Any]) -> CBAM:
    device, dtype = _placement(decoder)
    return CBAM(in_channels, **options, device=device, dtype=dtype).train(decoder.training)


def _placement(decoder: nn.Module) -> tuple[torch.device, torch.dtype]:
    tensor = next(decoder.parameters(), None)
    if tensor is None:
        raise TypeError("add_cbam: the decoder of this model has no parameters to go by")
    return tensor.device, tensor.dtype


def _record(
    model: nn.Module, where: Any, init: Init, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Puts the arguments, as JSON can hold them, where smp keeps those of the model: there."""
    config: Any = model.config
    if not isinstance(config, dict):
        return None
    places = _check_where(where)
    entry = {
        "where": places[0] if places == [_as_place(where)] else places,
        "init": init,
        **options,
    }
    norm = entry.get("norm_layer")
    if norm is not None and not isinstance(norm, str):
        names = [name for name, known in NORMS.items() if known is norm]
        entry["norm_layer"] = names[0] if names else _full_name(norm)
    config["cbam"] = entry
    return config


def _full_name(norm: Any) -> str:
    """Not a name that could be looked up: loading stops at it, and the error shows it."""
    return f"{getattr(norm, '__module__', '')}.{getattr(norm, '__qualname__', repr(norm))}"
