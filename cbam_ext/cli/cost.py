"""``python -m cbam_ext cost``: what attention costs in a model of segmentation_models_pytorch."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import json
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import ops
from .. import smp as integration
from .._progress import track
from .._text import name_of
from .._version import __version__
from ..building import library
from ..conversion import to_plain
from ..cost import ROUNDS, CostTable, compare_costs
from ..reference import DTYPES
from ..smp import import_smp

OURS = "cbam_ext"

_DESCRIPTION = """\
Measures a model of segmentation_models_pytorch (smp) without attention, with smp's SCSE, with CBAM
in plain PyTorch, and with CBAM of this package: parameters, FLOPs, what autograd keeps for
backward, the time of a forward pass and of a training step. Weights are random; nothing is
downloaded. CBAM stands in the decoder blocks of Unet and UnetPlusPlus, and at the encoder's
stages in the other architectures, which have no place for SCSE.
"""
_EXAMPLES = """\
examples:
  python -m cbam_ext cost --size 256
  python -m cbam_ext cost --arch Unet --encoder resnet34 --size 512 --batch 4 --channels-last
  python -m cbam_ext cost --arch DeepLabV3Plus --encoder tu-resnet18 --where skips decoder --json
"""

# Their BatchNorms see one pixel of each image, and in training need more than one number.
_NEED_TWO = ("DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet")


def add_parser(commands: Any) -> None:
    """Adds the command to the sub-parsers of ``python -m cbam_ext``."""
    parser = commands.add_parser(
        "cost",
        help="measure what attention costs in an smp model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="Unet", help="architecture of smp (default: %(default)s)")
    parser.add_argument(
        "--encoder", default="resnet34", help="encoder of smp (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=_size,
        default=(512, 512),
        metavar="PIXELS",
        help="height and width of the image, or HxW (default: 512)",
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        help=f"images (default: 1; 2 for {', '.join(_NEED_TWO)}, which train on no less)",
    )
    parser.add_argument(
        "--where",
        nargs="+",
        metavar="PLACE",
        help='where cbam_ext.smp.add_cbam puts CBAM: "encoder", "skips", "bottleneck", "decoder", '
        '"residual", numbers of stages (default: see above)',
    )
    names = [name_of(dtype) for dtype in DTYPES]
    parser.add_argument(
        "--dtype", choices=names, default="float32", help="of models and image (default: float32)"
    )
    parser.add_argument("--channels-last", action="store_true", help="memory format of both")
    parser.add_argument(
        "--device", type=_device, help="such as cpu or cuda:0 (default: the GPU if there is one)"
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=ROUNDS,
        help="how often each model is timed (default: %(default)s)",
    )
    # Suppressed, because a default would undo a --json before the command.
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
    )


def run(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        ImportError: smp is not installed.
        ValueError: something about the options that a user can change.
        RuntimeError: something else, such as memory that ran out.
    """
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    models, facts = _build(options)
    shape = (options.batch or (2 if facts["arch"] in _NEED_TWO else 1), 3, *options.size)
    try:
        for model in models.values():
            model.to(device, getattr(torch, options.dtype), memory_format=layout)
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        image = image.to(device, getattr(torch, options.dtype))
        table = compare_costs(models, image.contiguous(memory_format=layout), rounds=options.rounds)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _explained(error, shape, facts) from error
    facts |= {
        "input": list(shape),
        "dtype": options.dtype,
        "layout": "channels_last" if options.channels_last else "contiguous",
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
    }
    if not ops.has_kernels(device.type):
        facts["notes"].append(
            f"{OURS} ran as plain PyTorch: {library.no_kernel_reason(device.type)}"
        )
    if getattr(options, "json", False):
        return json.dumps(
            {**facts, **table.as_dict(), "times_added": _times_added(table)}, indent=2
        )
    return _render(table, facts)


# --- models ---------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The models by the names of their rows, and what is to be said of them."""
    with _registered() as smp, torch.random.fork_rng(devices=[]):
        architecture = _architecture(smp, options.arch)
        name = architecture.__name__
        facts: dict[str, Any] = {"arch": name, "encoder": options.encoder}
        in_decoder = "decoder_attention_type" in inspect.signature(architecture).parameters
        notes = []
        attentions: dict[str, str | None] = {"no attention": None}
        if in_decoder and not options.where:
            facts["attention"] = "in the decoder blocks (decoder_attention_type)"
            attentions |= {"scse": "scse", OURS: "cbam"}
        else:
            where = [int(place) if place.isdecimal() else place for place in options.where or ()]
            where = where or ["encoder"]
            facts["attention"] = f"at {', '.join(map(str, where))} (cbam_ext.smp.add_cbam)"
            attentions[OURS] = None
            reason = f"smp's {name} has no place for it"
            if in_decoder:
                reason = "smp has it in the decoder blocks, which is elsewhere"
            notes.append(f"no row for scse: {reason}")
        models = {}
        for row, attention in track(attentions.items(), "building", total=len(attentions)):
            keywords = {"decoder_attention_type": attention} if in_decoder else {}
            try:
                models[row] = architecture(options.encoder, encoder_weights=None, **keywords)
            except (KeyError, RuntimeError, ValueError) as error:
                raise ValueError(_encoder_advice(smp, name, options.encoder, error)) from error
        if "scse" not in attentions:
            integration.add_cbam(models[OURS], where)
        elif not all(parameter.numel() for parameter in models["scse"].parameters()):
            del models["scse"]
            notes.append("no row for scse: it needs 16 channels, and a decoder block has fewer")
        ours = models.pop(OURS)
        # The faster formulation, which shares the gradient out among equal maxima.
        models |= {"plain CBAM": to_plain(ours, ties="even"), OURS: ours}
        facts["versions"] = {
            "torch": torch.__version__,
            "segmentation_models_pytorch": smp.__version__,
            "cbam_ext": __version__,
        }
        facts["notes"] = notes
    return models, facts


@contextlib.contextmanager
def _registered() -> Iterator[ModuleType]:
    """smp, knowing "cbam" for this while; afterwards it is as it was before."""
    smp = import_smp()
    attention = smp.base.modules.Attention
    before = attention.__init__
    integration.register()
    try:
        yield smp
    finally:
        if attention.__init__ is not before:
            integration.unregister()


def _architecture(smp: ModuleType, wish: str) -> type[nn.Module]:
    known = {c.__name__: c for c in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    for name, architecture in known.items():
        if name.lower() == wish.lower():
            return architecture
    raise ValueError(
        f"--arch: smp has no {wish!r}{_close(wish, known)}; it has {', '.join(sorted(known))}"
    )


def _encoder_advice(smp: ModuleType, architecture: str, encoder: str, error: Exception) -> str:
    """Why a model could not be built, in which the encoder has nearly always its part."""
    known = smp.encoders.get_encoder_names()
    if encoder in known or not any(t in str(error) for t in ("Wrong encoder", "Unknown model")):
        return f"--encoder: {architecture} cannot be built with {encoder!r}: {error}"
    import timm  # smp needs it

    candidates = [*known, *(f"tu-{name}" for name in timm.list_models())]
    return (
        f"--encoder: smp has no {encoder!r}{_close(encoder, candidates)}; "
        "smp.encoders.get_encoder_names() lists its own, and tu-NAME takes a model of timm"
    )


def _close(wish: str, known: Iterable[str]) -> str:
    lowered = {name.lower(): name for name in known}
    names = [lowered[match] for match in difflib.get_close_matches(wish.lower(), lowered, n=4)]
    return f", but {', '.join(names)}" if names else ""


def _explained(error: Exception, shape: tuple[int, ...], facts: dict[str, Any]) -> Exception:
    """The error that tells what to change."""
    text = str(error)
    size = "x".join(map(str, shape))
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return RuntimeError(f"out of memory: make --size or --batch smaller than {size} ({text})")
    if "more than 1 value per channel" in text:
        return ValueError(
            "--batch: a BatchNorm of this model sees one pixel of each image and needs two or more "
            f"images to train, as with --batch 2 ({text})"
        )
    return ValueError(f"{facts['arch']} with {facts['encoder']} failed for {size}: {text}")


# --- arguments ------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _size(text: str) -> tuple[int, int]:
    try:
        sizes = [_positive(part) for part in text.lower().split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 512 or 384x512")
    return sizes[0], sizes[-1]


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {error}") from error
    return device


# --- what is printed ------------------------------------------------------------------------------


def _render(table: CostTable, facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    where = table.device
    if facts["device_type"] == "cpu":
        where += f", {facts['threads']} threads"
    lines = [
        f"smp.{facts['arch']}, encoder {facts['encoder']}, attention {facts['attention']}",
        f"input {'x'.join(map(str, facts['input']))} {facts['dtype']} {facts['layout']}; {where}",
        f"{versions}; medians of {facts['rounds']} rounds, ratios within each",
        "",
        str(table),
        "",
    ]
    lines.append(f"Time that the attention adds, over that of {OURS}:")
    for direction, found in _times_added(table).items():
        told = ", ".join(
            f"{name} {'lost in noise' if number is None else f'{number:.1f}'}"
            for name, number in found.items()
        )
        lines.append(f"  {direction:<8}  {told}")
    lines += [
        "",
        "activations: what autograd keeps for backward beside parameters and input",
        "training: forward and backward in train mode; added: beside the first row",
    ]
    if "lost in noise" in "".join(lines):
        lines.append("lost in noise: seldom slower than the first row; more --rounds may tell")
    return "\n".join([*lines, *facts["notes"]])


def _times_added(table: CostTable) -> dict[str, dict[str, float | None]]:
    """By direction: how many times the time that ours adds the other attentions add."""
    others = [name for name in table.costs if name not in (table.baseline, OURS)]
    return {
        direction: {name: table.times_added(name, OURS, training) for name in others}
        for direction, training in (("forward", False), ("training", True))
    }
