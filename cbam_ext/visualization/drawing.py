"""The figures of :class:`cbam_ext.visualization.AttentionMaps`, drawn with matplotlib."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._text import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = 2.4  # inches, as all sizes
_BAR = 0.12
_LINE = 30  # characters of a title that fit above a panel


def overlays(
    gates: Mapping[str, Tensor],
    images: Tensor | Sequence[Tensor],
    normalisation: tuple[Tensor, Tensor] | None,
    *,
    alpha: float,
    rows: int,
    columns: int,
) -> Figure:
    """The first ``rows`` images with ``columns`` of the spatial gates."""
    names = list(gates)
    if columns < len(names):
        step = (len(names) - 1) / max(1, columns - 1)
        names = [names[round(i * step)] for i in range(columns)]
    for name in names:
        samples = len(gates[name])
        if samples != len(images):
            raise ValueError(
                f"{name} ran on {count(samples, 'sample')}, so its gates do not belong to the "
                f"{count(len(images), 'image')}: leave it out by visualize(..., modules=...)"
            )

    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            "the images have several sizes, and how the model brought them to one, by padding or "
            "by scaling, is not known, so gates cannot be laid over them: visualize them one by one"
        )
    images = torch.stack(list(images))
    height, width = images.shape[2:]
    panel_height = _PANEL * min(max(height / width, 0.3), 3)
    heights = [panel_height] * rows + [_BAR]
    figure = _new_figure("overlays()", _PANEL * (1 + columns), sum(heights) + 1.3)
    *axes, bars = figure.subplots(
        rows + 1, 1 + columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    bars[0].remove()  # below the images
    left_out = [
        f", {shown} of {count(total, what)}"
        for shown, total, what in ((columns, len(gates), "CBAM"), (rows, len(images), "image"))
        if shown < total
    ]
    figure.suptitle("CBAM spatial gates" + "".join(left_out))
    for row, picture in zip(axes, _pictures(images[:rows], normalisation), strict=True):
        row[0].imshow(picture)
        for axis in row[1:]:  # gray, so that all colours are those of the gate
            axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
        for axis in row:
            axis.set_axis_off()
    axes[0][0].set_title("image", fontsize="small")
    for column, (name, title) in enumerate(zip(names, _titles(names), strict=True), start=1):
        gate = gates[name][:rows, 0]
        panels = [row[column] for row in axes]
        _overlay(panels, bars[column], gate, title, alpha, (0, width, height, 0))
    return figure


def _overlay(
    panels: list[Any],
    below: Any,
    gate: Tensor,
    title: str,
    alpha: float,
    extent: tuple[int, int, int, int],
) -> None:
    """One column: the gate [N, H, W] over the images in ``panels``, its colours ``below``."""
    import numpy as np

    values, said = _finite(gate)
    low, high = 0.0, 1.0
    if values.size:
        said = [f"{values.min():.2f} to {values.max():.2f}", *said]
        # A few extreme values, mostly at the border, would take the contrast from all others.
        low, high = np.quantile(values, [0.01, 0.99])
        if high - low < 1e-3:  # else the rounding errors of a constant gate would fill the scale
            low, high = (low + high) / 2 - 5e-4, (low + high) / 2 + 5e-4
    for axis, one in zip(panels, gate, strict=True):
        shown = axis.imshow(
            one.numpy(),
            cmap="viridis",
            vmin=low,
            vmax=high,
            alpha=alpha,
            extent=extent,
            interpolation="bilinear",
        )
    height, width = gate.shape[1:]
    panels[0].set_title(f"{title}\n{height} x {width}: {', '.join(said)}", fontsize="small")
    bar = below.figure.colorbar(shown, cax=below, orientation="horizontal", extend="both")
    bar.set_label("spatial gate", fontsize="small")
    below.tick_params(labelsize="x-small")
    below.locator_params(nbins=4)


def histograms(gates: Mapping[str, Tensor]) -> Figure:
    """One panel for each channel gate."""
    columns = min(4, len(gates))
    rows = math.ceil(len(gates) / columns)
    figure = _new_figure("histograms()", 1.3 * _PANEL * columns, _PANEL * rows + 0.5)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.suptitle("CBAM channel gates")
    figure.supxlabel("gate", fontsize="small")
    figure.supylabel("channels of all images", fontsize="small")
    for axis, gate, title in zip(axes, gates.values(), _titles(list(gates)), strict=False):
        values, said = _finite(gate)
        said = [count(values.size, "gate"), *said]
        axis.hist(values, bins=50, range=(0, 1), color="tab:blue")
        if values.size:
            said.append(f"mean {values.mean():.2f}")
            axis.axvline(values.mean(), color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{title}\n{', '.join(said)}", fontsize="small")
        axis.set_xlim(0, 1)
        axis.tick_params(labelsize="small")
    for axis in axes[len(gates) :]:
        axis.remove()
    return figure


def _new_figure(caller: str, width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller} needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    # Notebooks show figures of pyplot only; this method is what they ask other objects for.
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _pictures(images: Tensor, normalisation: tuple[Tensor, Tensor] | None) -> Any:
    """``images`` as imshow takes them: a NumPy array [N, H, W, 3] of 8 bits."""
    values = images.float()
    if normalisation is not None:
        mean, std = normalisation
        values = values * std + mean
    elif images.dtype == torch.uint8:
        values = values / 255
    else:
        finite = values.isfinite()
        low = values.where(finite, torch.inf).amin((1, 2, 3), keepdim=True)
        high = values.where(finite, -torch.inf).amax((1, 2, 3), keepdim=True)
        if low.min() < 0 or high.max() > 1:
            values = (values - low) / (high - low).clamp(min=1e-12)
    values = values.nan_to_num(0).clamp(0, 1)
    if values.shape[1] not in (1, 3):
        values = values.mean(1, keepdim=True)
    values = values.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return values.mul(255).round().to(torch.uint8).numpy()


def _finite(gate: Tensor) -> tuple[Any, list[str]]:
    """The finite values as a NumPy array in float64, and words about others."""
    values = gate[gate.isfinite()].double().numpy()
    broken = gate.numel() - values.size
    return values, [f"{broken} NaN"] if broken else []


def _titles(names: list[str]) -> list[str]:
    """The names without an ending that all share, broken at dots into lines that fit."""
    paths = [name.partition("#")[0].split(".") for name in names]
    shared = len(names) > 1 and all(len(p) > 1 and p[-1] == paths[0][-1] for p in paths)
    titles = []
    for name, path in zip(names, paths, strict=True):
        lines = [""]
        for part in path[:-1] if shared else path:
            if lines[-1] and len(lines[-1]) + len(part) > _LINE:
                lines.append("")
            lines[-1] += f"{part}."
        _, mark, call = name.partition("#")
        titles.append("\n".join(lines)[:-1] + mark + call)
    return titles
