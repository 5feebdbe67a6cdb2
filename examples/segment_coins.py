"""Finds the coins in a photograph: a U-Net with CBAM attention, trained in about two minutes.

    python examples/segment_coins.py
    torchrun --nproc-per-node 2 examples/segment_coins.py

The photograph is scikit-image's `coins`, which comes with its wheel, so that nothing is downloaded.
The truth to learn is a watershed of the same photograph. Training sees the left two thirds only;
the right third, with its two largest coins, is what the result is judged by.

Prints the held-out IoU and the time of a training step with several kinds of attention; draws
photograph, truth, prediction, spatial attention of two decoder stages and these times.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

try:
    import matplotlib
    import numpy as np
    import segmentation_models_pytorch as smp
    from scipy import ndimage
    from skimage import data, filters, segmentation
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f'This example needs {error.name}. Install it with: pip install "cbam_ext[demo]"')

import cbam_ext.smp

matplotlib.use("Agg")  # draws to a file, also where there is no screen
from matplotlib import pyplot as plt

TARGET_IOU = 0.85
HELD_OUT = 256  # the first column of the photograph (384 wide) that training never sees
# Decoder stages whose attention is drawn, and their resolution next to the photograph's.
DRAWN_STAGES = {3: "half", 4: "full"}


# ------------------------------------------------------------------------------ the task


def load_photograph() -> tuple[Tensor, Tensor]:
    """The photograph, standardised, and its mask of coins (0 or 1): two [1, 1, H, W] tensors."""
    gray = data.coins()
    image = torch.from_numpy(gray).float()
    image = (image - image.mean()) / image.std()
    mask = torch.from_numpy(find_coins(gray)).float()
    return image[None, None], mask[None, None]


def find_coins(gray: np.ndarray) -> np.ndarray:
    """A boolean mask of the coins in an 8-bit photograph.

    Water that rises from the surely dark and the surely bright pixels meets where the brightness
    changes most, at the rim of the coins; a threshold would miss the dark coins, because the
    background is brighter at the top than at the bottom.
    """
    markers = np.zeros(gray.shape, dtype=np.int32)
    markers[gray < 30] = 1
    markers[gray > 150] = 2
    coins = segmentation.watershed(filters.sobel(gray), markers) == 2
    labels, _ = ndimage.label(ndimage.binary_fill_holes(coins))
    large = np.bincount(labels.ravel()) >= 200
    large[0] = False  # the background
    return large[labels]


def random_batches(
    image: Tensor, mask: Tensor, batch: int, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random crops, [batch, 1, size, size] each of photograph and mask."""
    # Mirrored edges, because crops from inside would hardly ever show the border of the photograph.
    both = F.pad(torch.cat([image, mask], dim=1), 4 * [size // 4], mode="reflect")
    while True:
        crops = torch.cat([random_crop(both, size, generator) for _ in range(batch)])
        # Other light: a random contrast and brightness per crop.
        light = 0.3 * torch.randn(2, batch, 1, 1, 1, generator=generator)
        yield crops[:, :1] * light[0].exp() + light[1], crops[:, 1:].round()


def random_crop(both: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A square of random place, scale and orientation from [1, 2, H, W], resized to ``size``."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    height, width = both.shape[2:]
    # Crops of half to one and a half times the size show the coins larger and smaller as well.
    side = draw(size // 2, min(3 * size // 2, height, width))
    top, left = draw(0, height - side), draw(0, width - side)
    crop = both[..., top : top + side, left : left + side]
    crop = torch.rot90(crop, draw(0, 3), dims=(2, 3))
    if draw(0, 1):
        crop = crop.flip(3)
    return F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------ the models


def make_unet(attention: str | dict | None) -> nn.Module:
    """A U-Net for gray images, without the attention that it would build but never run."""
    model = smp.Unet(
        "resnet18", encoder_weights=None, in_channels=1, decoder_attention_type=attention
    )
    return cbam_ext.smp.prune_unused(model)


class PlainCBAM(nn.Module):
    """CBAM as a chain of PyTorch operators, with the parameters of a ``cbam_ext.CBAM``."""

    def __init__(self, source: cbam_ext.CBAM) -> None:
        super().__init__()
        self.mlp = nn.Sequential(source.channel.fc1, nn.ReLU(), source.channel.fc2)
        self.conv = source.spatial.conv

    def forward(self, x: Tensor) -> Tensor:
        channel = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * channel[:, :, None, None]
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(maps))


def make_plain_unet() -> nn.Module:
    model = make_unet("cbam")
    for module in list(model.modules()):
        if isinstance(getattr(module, "attention", None), cbam_ext.CBAM):
            module.attention = PlainCBAM(module.attention)
    return model


# ------------------------------------------------------------------------------ training


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, masks: Tensor
) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(model(images), masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    device: torch.device,
    show_progress: bool,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # The rate rises for a tenth of the steps and then falls along a cosine.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(10 * (step + 1) / steps, (1 + math.cos(math.pi * step / steps)) / 2),
    )
    progress = tqdm(range(steps), desc="training", unit="step", disable=not show_progress)
    for _ in progress:
        images, masks = (tensor.to(device) for tensor in next(batches))
        loss = train_step(model, optimizer, images, masks)
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def predict(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The probability of coin for every pixel, and the spatial attention of the drawn stages.

    Args:
        image: [1, 1, H, W], of any size.

    Returns:
        [1, 1, H, W] and, by decoder stage, [1, 1, height, width] at that stage's resolution.
    """
    height, width = image.shape[2:]
    padded = F.pad(image, (0, -width % 32, 0, -height % 32), mode="replicate")
    model.eval()
    probability = torch.sigmoid(model(padded))[..., :height, :width].cpu()
    maps = cbam_ext.visualize(model, padded, modules="decoder.*.attention2.*")
    attention = {
        stage: maps[f"decoder.blocks.{stage}.attention2.attention"].spatial_gate
        for stage in DRAWN_STAGES
    }
    return probability, attention


def intersection_over_union(predicted: Tensor, truth: Tensor) -> float:
    predicted, truth = predicted > 0.5, truth > 0.5
    return ((predicted & truth).sum() / (predicted | truth).sum()).item()


# ------------------------------------------------------------------------------ timing


def time_training_steps(images: Tensor, masks: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds of forward, backward and optimiser, by kind of attention.

    The kinds take turns, so that whatever else the machine does disturbs all of them alike.
    """
    models = {
        "cbam_ext": make_unet("cbam"),
        "plain PyTorch CBAM": make_plain_unet(),
        "SCSE": make_unet("scse"),
        "no attention": make_unet(None),
    }
    for model in models.values():
        model.to(images.device).train()
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(repeats + 1), desc="timing", unit="round"):
        for name, model in models.items():
            start = time.perf_counter()
            train_step(model, optimizers[name], images, masks).item()  # item() waits for a GPU
            times[name].append(1e3 * (time.perf_counter() - start))
    # The first round warms up caches and allocators.
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def print_times(times: dict[str, float], batch_shape: torch.Size, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"\nTime per training step, batch {list(batch_shape)}, {where}:")
    for name, milliseconds in times.items():
        extra = milliseconds - times["no attention"]
        cost = "" if name == "no attention" else f"   attention costs {extra:+6.1f} ms"
        print(f"  {name:<20}{milliseconds:8.1f} ms{cost}")


# ------------------------------------------------------------------------------ the picture


def draw(
    image: Tensor,
    mask: Tensor,
    probability: Tensor,
    attention: dict[int, Tensor],
    iou: float,
    times: dict[str, float],
) -> plt.Figure:
    height, width = image.shape[2:]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.suptitle("U-Net (resnet18) with CBAM in the decoder, trained left of the dashed line")
    extent = (0, width, height, 0)
    titles = "photograph", "truth (watershed)", f"prediction, held-out IoU {iou:.3f}"
    for axis, title, shown in zip(axes[0], titles, (image, mask, probability), strict=True):
        axis.imshow(shown[0, 0].numpy(), cmap="gray", extent=extent)
        axis.set_title(title)
    for axis, (stage, resolution) in zip(axes[1], DRAWN_STAGES.items(), strict=False):
        draw_attention(figure, axis, attention[stage], extent)
        axis.set_title(f"spatial attention, stage {stage + 1} ({resolution} resolution)")
    for axis in axes.flat[:5]:
        axis.axvline(HELD_OUT, color="tab:orange", linestyle="--", linewidth=1.5)
        axis.set_axis_off()
    draw_times(axes[1, 2], times)
    return figure


def draw_attention(figure, axis, gate: Tensor, extent: tuple[int, int, int, int]) -> None:
    _, width, height, _ = extent
    # The gate covers the padded image; cut the padding off at the gate's own resolution.
    scale = gate.shape[3] / (width + -width % 32)
    values = gate[0, 0, : round(height * scale), : round(width * scale)].numpy()
    # A few extreme values, mostly at the border, would take the contrast from all others.
    low, high = np.quantile(values, [0.01, 0.99])
    shown = axis.imshow(values, cmap="viridis", vmin=low, vmax=high, extent=extent)
    figure.colorbar(shown, ax=axis, orientation="horizontal", shrink=0.8, pad=0.02, extend="both")


def draw_times(axis, times: dict[str, float]) -> None:
    colors = ["tab:orange", *["lightgray"] * (len(times) - 1)]
    bars = axis.barh(list(times), list(times.values()), color=colors)
    for bar, (name, milliseconds) in zip(bars, times.items(), strict=True):
        middle = bar.get_y() + bar.get_height() / 2
        axis.text(0, middle, f"  {name}: {milliseconds:.0f} ms", va="center")
    axis.invert_yaxis()
    axis.set_title("time per training step")
    axis.set_axis_off()


# ------------------------------------------------------------------------------ the program


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a U-Net with CBAM attention to find coins, in about two minutes."
    )
    add = parser.add_argument
    add("--steps", type=int, default=120, help="training steps (default: %(default)s)")
    add("--batch", type=int, default=8, help="crops per step (default: %(default)s)")
    add("--size", type=int, default=96, help="side of a crop in pixels (default: %(default)s)")
    add("--repeats", type=int, default=11, help="timed steps of each kind (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and crops (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--output", type=Path, default=Path("coins.png"), help="picture (default: %(default)s)")
    add("--quick", action="store_true", help="a trial of a few seconds, whatever the IoU")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.batch, arguments.size, arguments.repeats = 4, 2, 64, 1
    for name in ("steps", "batch", "repeats", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 32 <= arguments.size <= HELD_OUT or arguments.size % 32:
        parser.error(f"--size must be a multiple of 32, from 32 to {HELD_OUT}")
    if arguments.output.suffix != ".png":
        parser.error(f"--output must end in .png, got {arguments.output}")
    try:
        arguments.device = choose_device(arguments.device)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    return arguments


def choose_device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("--device cuda: this PyTorch finds no GPU; use --device cpu")
        if device.index is None:  # under torchrun one GPU per process
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def main() -> int:
    arguments = parse_arguments()
    device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)

    # torchrun sets these; without it there is one process.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    image, mask = load_photograph()
    generator = torch.Generator().manual_seed(arguments.seed + 1000 * rank)
    seen = image[..., :HELD_OUT], mask[..., :HELD_OUT]
    local_batch = max(1, arguments.batch // world_size)
    batches = random_batches(*seen, local_batch, arguments.size, generator)

    cbam_ext.smp.register()
    model = make_unet("cbam").to(device)
    if world_size == 1:
        train(model, batches, arguments.steps, device, show_progress=True)
    else:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        train(DistributedDataParallel(model), batches, arguments.steps, device, rank == 0)
        torch.distributed.destroy_process_group()
    if rank > 0:
        return 0

    probability, attention = predict(model, image.to(device))
    iou = intersection_over_union(probability[..., HELD_OUT:], mask[..., HELD_OUT:])
    images, masks = (tensor.to(device) for tensor in next(batches))
    times = time_training_steps(images, masks, arguments.repeats)
    figure = draw(image, mask, probability, attention, iou, times)
    figure.savefig(arguments.output, dpi=110)
    print(f"\nHeld-out IoU: {iou:.3f}")
    print_times(times, images.shape, device)
    print(f"\nPicture: {arguments.output}")
    if iou < TARGET_IOU and not arguments.quick:
        print(f"The held-out IoU is below {TARGET_IOU}: training failed.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
