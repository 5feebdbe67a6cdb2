"""CBAM into any model, and out again: :func:`add_cbam`, :func:`remove_cbam`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from .._inputs import Call, as_call
from ..layers import Init
from ..module import CBAM
from .choice import check_after
from .hooks import Placed, are_placed, forget_compiled_code, put
from .options import resolve_options
from .places import LAYOUTS, Place, find_places
from .survey import Survey, survey

_SIZE = 224  # of images, where none are given; transformers of that size take no other


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
def add_cbam(
    model: nn.Module,
    after: str | Iterable[str] | Callable[[str, nn.Module], bool],
    *,
    example_inputs: Any = None,
    init: Init = "default",
    layout: Literal["nchw", "nhwc"] = "nchw",
    **cbam_options: Any,
) -> nn.Module:
    """Puts CBAM behind modules of any model, in place, before or after training.

    Every weight and every key of the ``state_dict`` stays, and so does every forward: each CBAM is
    a child ``cbam`` of the module whose output it refines, and a forward hook calls it. To load
    what was saved, call this with the same arguments and then ``load_state_dict``. Give the new
    parameters to the optimiser, that is, call this before making it, and before
    DistributedDataParallel. Whatever ``torch.compile`` made in this process before is compiled
    anew. :func:`remove_cbam` takes all out again.

    The model is run once, in eval mode and, where it can be, on tensors without numbers, to see
    channels, devices and the order of things. It stays as it was: buffers, modes, random state.

    Args:
        model: any module; not one that is wrapped, compiled or scripted.
        after: the modules behind which CBAMs stand.

            * a name of ``model.named_modules()``, or a pattern as in a shell, part by part, so
              that ``*`` does not go past a dot: "layer[34]", "backbone.stages.*"; or several.
            * a function of (name, module) that returns whether it is one.
            * "residual": the end of the residual branch, before the addition, in every block that
              adds its input, as the paper's figure 3 has it in a ResBlock: those of ResNets, with
              SE or pre-activation, inverted residuals, ConvNeXt. Before stochastic depth and
              dropout.

            Where a ``Sequential`` or another module that runs or counts its children is meant, the
            CBAM is a child of the one among them whose output that is.
        example_inputs: what the model is called with: a tensor or another single argument, a tuple
            of the positional arguments, or a dict of the keyword arguments. None: two images of
            224 x 224, with the channels of the model's first convolution.
        init: how the gates begin, as in :class:`cbam_ext.CBAM`; "identity" for a trained model.
        layout: of the feature maps: "nchw", or "nhwc" where channels are the last dimension, as
            between the blocks of a Swin transformer.
        **cbam_options: of :class:`cbam_ext.CBAM`: ``reduction``, ``kernel_size``,
            ``hidden_channels``, ``mlp_bias``, ``conv_bias``, ``norm_layer``; the norm may be
            "batchnorm" or "instancenorm".

    Returns:
        ``model``, with CBAMs of the device, dtype and mode of what is around them.

    Raises:
        TypeError: an argument has a wrong type, or the model takes other inputs.
        ValueError: nothing matches, or what matches returns no ``[N, C, H, W]`` map, is run more
            than once or not at all; the model has CBAMs by this function already; or an option is
            unknown or does not fit ``init``. The model is as it was.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU()))
        >>> net = add_cbam(net, after="1", init="identity")
        >>> [name for name, module in net.named_modules() if isinstance(module, CBAM)]
        ['1.1.cbam']
    """
    _check_model(model)
    options = resolve_options("add_cbam", "CBAM", {**cbam_options, "init": init})
    if layout not in LAYOUTS:
        raise ValueError(f"add_cbam: layout must be 'nchw' or 'nhwc', got {layout!r}")
    after = check_after(after)
    if example_inputs is None:
        run = partial(survey_images, model)
    else:
        run = partial(survey, model, as_call(example_inputs))
    places = find_places(model, after, run, layout)
    for each in prepare(places, options):
        each.put()
    forget_compiled_code()
    return model


def remove_cbam(model: nn.Module) -> nn.Module:
    """Takes out what :func:`add_cbam` or :func:`cbam_ext.smp.add_cbam` put in, in place.

    Other CBAMs stay. Parameters, modes and other hooks are as they were; those of the CBAMs are
    gone from the ``state_dict``, so make the optimiser afterwards.

    Args:
        model: any module that holds such CBAMs.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: it has none.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        >>> remove_cbam(add_cbam(net, "1"))
        Sequential(
          (0): Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"remove_cbam: model must be a torch.nn.Module, got {type(model).__name__}")
    if not are_placed(model):
        raise ValueError(f"remove_cbam: {type(model).__name__} has no CBAMs by add_cbam")
    for host in list(model.modules()):
        placed = Placed.on(host)
        if placed is not None:
            placed.remove_from(host)
    forget_compiled_code()
    return model


class Prepared(NamedTuple):
    """A CBAM that can be put at its place."""

    place: Place
    cbam: CBAM

    def put(self, record: dict[str, Any] | None = None) -> None:
        """``record``: a dict that tells of it under "cbam", until it is taken out."""
        place = self.place
        put(place.host, self.cbam, before=place.before, nhwc=place.nhwc, record=record)


def prepare(places: list[Place], options: dict[str, Any]) -> list[Prepared]:
    """All are made before any is placed, so that an error leaves the model as it was.

    ``options`` are those of :func:`cbam_ext.placement.resolve_options`.
    """
    return [
        Prepared(
            place,
            CBAM(place.channels, **options, device=place.device, dtype=place.dtype).train(
                place.host.training
            ),
        )
        for place in places
    ]


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"add_cbam: model must be a torch.nn.Module, got {type(model).__name__}")
    wrapped = isinstance(model, DataParallel | DistributedDataParallel | torch.jit.ScriptModule)
    if wrapped or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"add_cbam: model is a {type(model).__name__}; call add_cbam on the model itself, "
            "before it is wrapped, compiled or scripted"
        )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"add_cbam: {name} has no shape yet; run the model once before")
    check_without(model)


def check_without(model: nn.Module) -> None:
    """That no CBAMs were placed in ``model``."""
    if are_placed(model):
        raise ValueError(
            f"add_cbam: this {type(model).__name__} has CBAMs by add_cbam already; name all places "
            "in one call, or take them out first by cbam_ext.remove_cbam(model)"
        )


def survey_images(model: nn.Module) -> Survey:
    """:func:`survey` of a model of which is known only that it takes images."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise TypeError(
            f"add_cbam: {type(model).__name__} has no convolution that would tell what it takes; "
            "give example_inputs"
        )
    shape = (2, first.in_channels, _SIZE, _SIZE)
    generator = torch.Generator()  # its own, which leaves that of the process alone
    images = torch.rand(shape, generator=generator, device="cpu").to(first.weight.dtype)
    try:
        return survey(model, Call((images,), {}))
    except Exception as error:
        raise TypeError(
            f"add_cbam: {type(model).__name__} does not run on two images of {_SIZE} x {_SIZE} "
            f"with {first.in_channels} channels; give example_inputs, what it is called with"
        ) from error
