"""Runs a model and collects the gates of its CBAMs: :func:`visualize`."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from .._inputs import Call, as_call, left_alone
from ..module import CBAM
from .gates import Gates
from .maps import AttentionMaps


def visualize(
    model: nn.Module,
    images: Any,
    *,
    modules: str | Iterable[str] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> AttentionMaps:
    """Runs ``model`` once and collects the gates of every CBAM that this calls.

    The model runs in eval mode, without gradients and uncompiled, under the autocast that is on.
    Afterwards it is as it was: training flags, running statistics, gradients and PyTorch's random
    numbers on the CPU and its GPU. A model in ``torch.compile``, DataParallel or
    DistributedDataParallel is looked at inside its wrapper; of the latter, in one process. CBAMs
    that are scripted or traced by themselves are left out, with a warning that names them.

    Args:
        model: any module that holds CBAMs, or a CBAM.
        images: ``[N, channels, H, W]``, or a list of ``[channels, H, W]`` for a model that takes
            such a list; on any device: moved to that of the model's parameters and, where
            floating, converted to their dtype. A model that takes more is given a tuple of all
            positional arguments, or a dict of all keyword arguments, the images first.
        modules: the CBAMs to look at: names from ``model.named_modules()`` or shell patterns of
            them such as ``"decoder.*"``; None for all.
        mean, std: of the normalisation that made ``images``, numbers or one per channel, which the
            pictures undo. A mean above 1 says that white was 255 before, else it was 1. Without
            them, values in [0, 1] are shown as they are and others between their extremes.

    Returns:
        The gates by name of the module, in the order of the calls, with methods that draw. The
        second call of a module is called ``"name#2"``; one that has several names, by its first.

    Raises:
        TypeError: ``model`` is no module or scripted, ``images`` begin with no tensor, or are not
            what the model takes.
        ValueError: ``images`` is no batch of images, the model has no CBAM or calls none,
            ``modules`` match none, or ``mean`` and ``std`` do not fit.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), CBAM(16))
        >>> maps = visualize(model, torch.rand(2, 3, 34, 34))
        >>> maps["1"].channel_gate.shape, maps["1"].spatial_gate.shape
        (torch.Size([2, 16, 1, 1]), torch.Size([2, 1, 32, 32]))
        >>> maps.overlays().savefig("overlays.png")  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    call = as_call(images)
    pictures = _pictures(call)
    normalisation = _check_normalisation(mean, std, pictures[0].shape[0])
    if normalisation is not None and not pictures[0].is_floating_point():
        raise ValueError(f"mean and std undo a normalisation, but images are {pictures[0].dtype}")
    model = _unwrap(model)
    chosen = _choose(_find(model), modules)
    gates: dict[str, Gates] = {}
    shown = [p.detach().to("cpu", copy=True) for p in pictures]  # a forward may work in place
    with left_alone(model), contextlib.ExitStack() as hooks:
        for name, module in chosen.items():
            hook = functools.partial(_collect, gates, name)
            # Before forward, when FSDP has gathered the parameters and not yet freed them again.
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        _as_model_wants(model, call).run(model)
    if not gates:
        raise ValueError(
            f"forward of {type(model).__name__} called none of these CBAMs: {', '.join(chosen)}"
        )
    return AttentionMaps(gates, shown, normalisation)


def _pictures(call: Call) -> list[Tensor]:
    """The images that the first argument holds, each ``[channels, H, W]``.

    A list may hold them one by one, or something around each, such as a dict: there the first
    tensor is the image.
    """
    first = next(iter((*call.args, *call.kwargs.values())), None)
    in_list = isinstance(first, list | tuple)
    pictures: list[Tensor] = []
    for each in first if in_list else [first]:
        image = next((leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)), None)
        if image is None:
            raise TypeError(
                "images must be a tensor, a list of tensors, or a tuple or dict of the model's "
                f"arguments that begins with these, got {_described(each, call)}"
            )
        hint = "; for one image: images[None]" if image.ndim == 3 else ""
        if in_list and image.ndim == 3:
            image = image[None]
        if image.ndim != 4 or not image.numel():
            raise ValueError(
                "images must be [N, channels, H, W] (in a list each [channels, H, W]) and not "
                f"empty, got {list(image.shape)}{hint}"
            )
        pictures += image
    if not pictures:
        raise ValueError("images must not be empty, got an empty list")
    return pictures


def _described(argument: Any, call: Call) -> str:
    return type(argument).__name__ if any(call) else "no arguments"


def _check_normalisation(
    mean: float | Sequence[float] | None, std: float | Sequence[float] | None, channels: int
) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation as [C, 1, 1] or [1, 1, 1], in units where white is 1."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        missing = "mean" if mean is None else "std"
        raise ValueError(f"mean and std go together, {missing} is missing")
    tensors = []
    for name, value in (("mean", mean), ("std", std)):
        tensor = torch.as_tensor(value, dtype=torch.float32, device="cpu").detach()
        if tensor.ndim > 1 or tensor.numel() not in (1, channels):
            raise ValueError(
                f"{name} must be a number or one for each of the {channels} channels of images, "
                f"got shape {list(tensor.shape)}"
            )
        tensors.append(tensor.reshape(-1, 1, 1))
    white = 255.0 if tensors[0].max() > 1 else 1.0
    return tensors[0] / white, tensors[1] / white


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and the parallel wrappers.

    Compiled code does not see new hooks. The wrappers would run hooks in threads, or talk to
    processes that are not looking.
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _find(model: nn.Module) -> dict[str, CBAM]:
    """The CBAMs of ``model`` by name; the model itself has the name of its class."""
    found = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, CBAM)
    }
    if found:
        _tell_of_scripted(model)
        return found
    message = f"model ({type(model).__name__}) has no cbam_ext.CBAM"
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(
            f"{message} that can be looked into, because it is scripted or traced; "
            "pass the model that it was made from"
        )
    for name, module in model.named_modules():
        if "cbam" in type(module).__name__.lower():
            where = f"model.{name}" if name else "model"
            raise ValueError(
                f"{message}, but {where} is a {type(module).__module__}.{type(module).__name__}; "
                "if that is a CBAM, convert it first: model = cbam_ext.convert(model)"
            )
    raise ValueError(f"{message}; there is nothing to look at")


def _tell_of_scripted(model: nn.Module) -> None:
    """Warns of CBAMs that cannot be looked into, beside those that can."""
    left_out = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule) and module.original_name == CBAM.__name__
    ]
    if left_out:
        warnings.warn(
            f"visualize leaves out {', '.join(left_out)}: what is scripted or traced cannot be "
            "looked into; pass the model that it was made from",
            UserWarning,
            stacklevel=4,
        )


def _choose(found: dict[str, CBAM], modules: str | Iterable[str] | None) -> dict[str, CBAM]:
    if modules is None:
        return found
    patterns = [modules] if isinstance(modules, str) else list(modules)
    chosen = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"modules must be names or patterns, got {type(pattern).__name__}")
        names = {n for n in found if n == pattern or fnmatch.fnmatchcase(n, pattern)}
        if not names:
            raise ValueError(f"modules: no CBAM is called {pattern!r}, only {', '.join(found)}")
        chosen |= names
    if not chosen:
        raise ValueError("modules must hold at least one name; None looks at all CBAMs")
    return {name: module for name, module in found.items() if name in chosen}


def _as_model_wants(model: nn.Module, call: Call) -> Call:
    """``call`` on the device of ``model``, and its images, the first argument, in its dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)

    def move(tensor: Tensor) -> Tensor:
        device = tensor.device if parameter is None else parameter.device
        return tensor.to(device, copy=True)  # a forward may work in place

    def cast(tensor: Tensor) -> Tensor:
        if parameter is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(parameter.dtype)

    moved = call.map(move)
    if moved.args:
        images, *others = moved.args
        return Call((tree_map_only(Tensor, cast, images), *others), moved.kwargs)
    (name, images), *rest = moved.kwargs.items()
    return Call((), {name: tree_map_only(Tensor, cast, images), **dict(rest)})


def _collect(
    gates: dict[str, Gates],
    name: str,
    module: CBAM,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
) -> None:
    key, call = name, 1
    while key in gates:
        call += 1
        key = f"{name}#{call}"
    channel_gate, spatial_gate = module.attention(*args, **kwargs)
    gates[key] = Gates(
        None if module.channel is None else channel_gate.cpu(),
        None if module.spatial is None else spatial_gate.cpu(),
    )
