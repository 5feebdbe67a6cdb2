"""One training: a model with its attention, trained on the crops of its seed, and judged.

What a run needs to go on is on the disk every half minute, and what it found once it is done. Both
are written beside their place and then moved there, so that no file is ever half of one.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbam_ext.smp

from . import StudyError
from .data import Data, random_batches

KEPT_EVERY = 30  # seconds
WITHOUT_CBAM = ("none", "scse")
IN_BLOCKS = "blocks"  # smp's own place: decoder_attention_type


class Variant(NamedTuple):
    """What stands in a model: "none", "scse", or CBAM at a place, with gates that begin somehow."""

    place: str
    init: str | float | None = None

    def __str__(self) -> str:
        return self.place if self.init is None else f"{self.place}, {self.init}"


@dataclass(frozen=True)
class Settings:
    """What all runs of a study have in common; results of others are not comparable."""

    arch: str
    encoder: str
    weights: str | None
    steps: int
    size: int
    batch: int
    lr: float
    device: str
    data: str  # its fingerprint
    torch: str = torch.__version__
    segmentation_models_pytorch: str = smp.__version__
    cbam_ext: str = cbam_ext.__version__


class Outcome(NamedTuple):
    variant: Variant
    seed: int
    iou: float
    losses: list[float]  # of every step


# ------------------------------------------------------------------------------ models


def places_of(arch: str) -> list[str]:
    """Those that can be compared in an architecture, beside the numbers of stages."""
    named = ["encoder", "skips", "bottleneck", "decoder", "residual"]
    in_blocks = "decoder_attention_type" in inspect.signature(_architecture(arch)).parameters
    return ["none", *(["scse", IN_BLOCKS] if in_blocks else []), *named]


def build(variant: Variant, settings: Settings, data: Data, seed: int) -> nn.Module:
    """The model; all variants of one seed have the same weights in what they share.

    Raises:
        StudyError: there is no such model.
    """
    architecture = _architecture(settings.arch)
    options = {
        "encoder_weights": settings.weights,
        "in_channels": data.channels,
        "classes": data.outputs,
    }
    try:
        torch.manual_seed(seed)
        model = architecture(settings.encoder, **options)
        torch.manual_seed(seed)
        if variant.place == "none":
            return model
        if variant.place in ("scse", IN_BLOCKS):
            kind: Any = "scse"
            if variant.place == IN_BLOCKS:
                kind = {"type": "cbam", "init": variant.init}
            options |= {"encoder_weights": None, "decoder_attention_type": kind}
            shared = model.state_dict()
            model = cbam_ext.smp.prune_unused(architecture(settings.encoder, **options))
            unexpected = model.load_state_dict(shared, strict=False).unexpected_keys
            assert not unexpected, unexpected
            return model
        where = [int(part) if part.isdecimal() else part for part in variant.place.split("+")]
        return cbam_ext.smp.add_cbam(model, where, init=variant.init)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StudyError(
            f"{settings.arch} with {settings.encoder} and {variant}: {str(error).splitlines()[0]}"
        ) from error


def _architecture(name: str) -> type[nn.Module]:
    known = {each.__name__: each for each in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    for each, architecture in known.items():
        if each.lower() == name.lower():
            return architecture
    raise StudyError(f"--arch: smp has no {name}; it has {', '.join(sorted(known))}")


# ------------------------------------------------------------------------------ training


def train(
    variant: Variant,
    seed: int,
    settings: Settings,
    data: Data,
    folder: Path,
    tell: Callable[[int, float], None],
) -> Outcome:
    """Trains and judges one model, from where it was interrupted if it was.

    ``tell`` is called with the number of steps done and the loss, after each.
    """
    model = build(variant, settings, data, seed).to(settings.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout; models draw different amounts when they are built
    part = folder / f"{_stem(variant, seed)}.part"
    losses = _take_up(part, model, optimizer, generator)
    batches = random_batches(data.train, settings.batch, settings.size, generator)
    kept = time.monotonic()
    while len(losses) < settings.steps:
        done = len(losses)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 + math.cos(math.pi * done / settings.steps)) / 2
        images, masks = (tensor.to(settings.device) for tensor in next(batches))
        loss = loss_of(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        tell(done + 1, losses[-1])
        if time.monotonic() - kept > KEPT_EVERY and len(losses) < settings.steps:
            _keep(part, model, optimizer, generator, losses)
            kept = time.monotonic()
    outcome = Outcome(variant, seed, held_out_iou(model, data, settings.device), losses)
    found = {"place": variant.place, "init": variant.init, **outcome._asdict()}
    del found["variant"]
    write(folder / f"{_stem(variant, seed)}.json", json.dumps(found).encode())
    part.unlink(missing_ok=True)
    return outcome


def loss_of(logits: Tensor, masks: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], masks.to(logits.dtype))
    return F.cross_entropy(logits, masks)


@torch.no_grad()
def held_out_iou(model: nn.Module, data: Data, device: str) -> float:
    """Of two classes that of the second; of more the mean. All held-out pixels count alike."""
    model.eval()
    common, either = torch.zeros(data.classes), torch.zeros(data.classes)
    for pair in data.held_out:
        image, (height, width) = pair.standardised()[None], pair.mask.shape
        padding = 0, -width % 32, 0, -height % 32
        logits = model(F.pad(image, padding, mode="replicate").to(device)).cpu()
        logits = logits[0, :, :height, :width]
        predicted = (logits[0] > 0).long() if len(logits) == 1 else logits.argmax(0)
        for each in range(data.classes):
            found, true = predicted == each, pair.mask == each
            common[each] += (found & true).sum()
            either[each] += (found | true).sum()
    ious = common / either
    return float(ious[1] if data.classes == 2 else ious.mean())


def _keep(
    part: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    losses: list[float],
) -> None:
    beside = part.with_suffix(".tmp")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "crops": generator.get_state(),
        "random": torch.get_rng_state(),
        "losses": losses,
    }
    torch.save(state, beside)
    os.replace(beside, part)


def _take_up(
    part: Path, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> list[float]:
    """Brings everything to where it was kept; the losses until then."""
    if not part.exists():
        return []
    state = torch.load(part, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["crops"])
    torch.set_rng_state(state["random"])
    return list(state["losses"])


# ------------------------------------------------------------------------------ files


def write(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)


def open_folder(output: Path, settings: Settings) -> Path:
    """The folder of the runs, of this study alone.

    Raises:
        StudyError: another one has results there.
    """
    runs = output / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        notes = output / "settings.json"
        if notes.exists():
            before, now = json.loads(notes.read_text()), asdict(settings)
            for name in now:
                if before.get(name) != now[name]:
                    raise StudyError(
                        f"{output} holds results of another study, whose {name} is "
                        f"{before.get(name)} and not {now[name]}; name another --output, or delete "
                        "that folder"
                    )
        else:
            write(notes, json.dumps(asdict(settings), indent=2).encode())
    except (OSError, ValueError) as error:
        raise StudyError(f"--output: {error}") from error
    return runs


def load(folder: Path, variants: Iterable[Variant], seeds: Iterable[int]) -> list[Outcome]:
    """What has been found already of these.

    Raises:
        StudyError: a file is not what it was written as.
    """
    seeds, found = list(seeds), []
    for variant in variants:
        for seed in seeds:
            path = folder / f"{_stem(variant, seed)}.json"
            if path.exists():
                try:
                    told = json.loads(path.read_text())
                    found.append(Outcome(variant, seed, told["iou"], told["losses"]))
                except (KeyError, TypeError, ValueError) as error:
                    raise StudyError(f"{path} is damaged ({error}); delete it") from error
    return found


def _stem(variant: Variant, seed: int) -> str:
    return f"{variant}-{seed}".replace(", ", "-")
