"""Pictures of gates: what they show, what they leave out, and TensorBoard."""

from __future__ import annotations

import itertools
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cbam_ext.smp
from cbam_ext.visualization import AttentionMaps, Gates, visualize

from support.backends import SEED
from support.looks import images, plain
from support.samples import same_bits

# --------------------------------------------------------------------------------------- pictures


def rendered(figure) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba()).copy())


def maps_of(count: int = 2, batch: int = 2, size: int = 8, names: str = "stage.{}.cbam"):
    """Maps made by hand, with gates that tell where they belong."""
    gates = {
        names.format(i): Gates(torch.rand(batch, 4, 1, 1), torch.rand(batch, 1, size, size))
        for i in range(count)
    }
    return AttentionMaps(gates, images(batch, height=2 * size, width=2 * size))


def grid(figure, columns: int) -> list[list]:
    """The panels by rows; the last axes are the colour bars, which the first column lacks."""
    panels = figure.axes[: 1 - columns]
    assert len(panels) % columns == 0
    assert all(len(bar.get_images()) == 0 for bar in bars(figure))
    return [panels[i : i + columns] for i in range(0, len(panels), columns)]


def bars(figure) -> list:
    return [axis for axis in figure.axes if axis.get_xlabel()]


def test_overlays_have_a_row_per_image_and_a_column_per_cbam():
    maps = maps_of(3)
    figure = maps.overlays(alpha=0.25)
    rows = grid(figure, 4)
    assert len(rows) == 2 and len(bars(figure)) == 3
    assert all(bar.get_xlabel() == "spatial gate" for bar in bars(figure))
    assert bars(figure) == figure.axes[-3:]
    assert figure.get_suptitle() == "CBAM spatial gates"
    assert rows[0][0].get_title() == "image"
    for column, (name, (_, gate)) in enumerate(maps.items(), start=1):
        title = rows[0][column].get_title()
        assert title == f"{name[:-5]}\n8 x 8: {gate.min():.2f} to {gate.max():.2f}"
        for row, one in zip(rows, gate, strict=True):
            below, above = row[column].get_images()
            assert np.array_equal(above.get_array(), one[0])  # the values; matplotlib resizes
            assert above.get_extent() == [0, 16, 16, 0] and above.get_alpha() == 0.25
            assert below.get_extent() == [-0.5, 15.5, 15.5, -0.5]
            assert above.get_interpolation() == "bilinear"
            limits = np.quantile(gate.double(), [0.01, 0.99])
            assert above.get_clim() == pytest.approx(tuple(limits))
    assert rendered(figure).float().std() > 10


def test_gate_and_image_cover_each_other():
    """In the drawn picture: the bright quarter of the gate is that of the image."""
    gate = torch.zeros(1, 1, 2, 2)
    gate[..., 1, 0] = 1
    maps = AttentionMaps({"a": Gates(torch.rand(1, 4, 1, 1), gate)}, torch.zeros(1, 1, 30, 60))
    figure = maps.overlays(alpha=1.0)
    pixels = rendered(figure)
    axis = grid(figure, 2)[0][1]
    height = pixels.shape[0]

    def color(x: float, y: float) -> list[float]:
        column, up = axis.transData.transform((x, y))
        return pixels[height - 1 - int(up), int(column), :3].float()

    corners = {(x, y): color(x, y) for x, y in itertools.product((3, 56), (3, 26))}
    bright = max(corners, key=lambda corner: corners[corner].sum().item())
    assert bright == (3, 26)
    others = [c for corner, c in corners.items() if corner != bright]
    assert all(torch.equal(c, others[0]) for c in others)


def test_results_are_copies():
    x = images()
    maps = visualize(plain(), x)
    before = rendered(maps.overlays())
    x.zero_()
    assert torch.equal(before, rendered(maps.overlays()))


def test_nothing_is_left_out_silently():
    maps = maps_of(11, batch=6, size=2)
    figure = maps.overlays()
    assert figure.get_suptitle() == "CBAM spatial gates, 8 of 11 CBAMs, 4 of 6 images"
    rows = grid(figure, 9)
    shown = [axis.get_title().split("\n")[0] for axis in rows[0][1:]]
    places = [int(title.split(".")[1]) for title in shown]
    assert len(rows) == 4 and len(set(places)) == 8
    assert places[0] == 0 and places[-1] == 10 and places == sorted(places)

    figure = maps.overlays(max_images=None, max_modules=None)
    assert figure.get_suptitle() == "CBAM spatial gates" and len(grid(figure, 12)) == 6
    figure = maps.overlays(max_images=1, max_modules=1)
    assert figure.get_suptitle() == "CBAM spatial gates, 1 of 11 CBAMs, 1 of 6 images"
    assert len(grid(figure, 2)) == 1
    assert len(maps.histograms().axes) == 11


@pytest.mark.parametrize("total", [1, 2, 5, 8, 13])
def test_any_choice_is_spread_from_first_to_last(total):
    maps = maps_of(total, batch=1, size=2, names="m{}")
    for limit in random.Random(SEED + total).sample(range(1, 10), 2):
        columns = 1 + min(limit, total)
        row = grid(maps.overlays(max_modules=limit), columns)[0]
        places = [int(axis.get_title().split("\n")[0][1:]) for axis in row[1:]]
        assert len(set(places)) == columns - 1 and places == sorted(places)
        assert places[0] == 0 and (limit == 1 or places[-1] == total - 1)


def shown_image(x: Tensor, **options) -> Tensor:
    maps = visualize(cbam_ext.CBAM(x.shape[1]), x, **options)
    panel = maps.overlays().axes[0]
    return torch.from_numpy(np.asarray(panel.get_images()[0].get_array())).float() / 255


def test_images_are_shown_in_their_own_colours():
    original = torch.rand(1, 3, 5, 7)
    expected = original[0].permute(1, 2, 0)

    def check(x: Tensor, wanted: Tensor = expected, **options) -> None:
        torch.testing.assert_close(shown_image(x, **options), wanted, atol=3e-3, rtol=0)

    check(original)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (original - mean[:, None, None]) / std[:, None, None]
    check(normalised, mean=mean.tolist(), std=std.tolist())
    check(normalised, mean=255 * mean, std=255 * std)
    check((original - 0.5) / 0.25, mean=0.5, std=[0.25])
    low, high = normalised.min(), normalised.max()
    check(normalised, ((normalised - low) / (high - low))[0].permute(1, 2, 0))
    five = torch.rand(1, 5, 5, 7)
    check(five, five.mean(1)[0, :, :, None].expand(-1, -1, 3))
    one = torch.rand(1, 1, 5, 7)
    check(one, one[0, 0, :, :, None].expand(-1, -1, 3))
    torch.testing.assert_close(shown_image(torch.full((1, 3, 5, 7), -2.0)), torch.zeros(5, 7, 3))


def test_images_of_bytes():
    class FromBytes(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 255)

    x = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    panel = visualize(FromBytes(*plain()), x).overlays().axes[0]
    assert np.array_equal(panel.get_images()[0].get_array(), x[0].permute(1, 2, 0))


def test_constant_and_broken_gates_are_drawn_and_said():
    x = images(1)
    x[0, 0, 0, 0] = torch.nan
    gates = {
        "constant": Gates(torch.full((1, 4, 1, 1), 0.5), torch.full((1, 1, 3, 3), 0.5)),
        "half": Gates(torch.tensor([[0.25, torch.nan]])[..., None, None], torch.rand(1, 1, 3, 3)),
        "broken": Gates(torch.full((1, 4, 1, 1), torch.nan), torch.full((1, 1, 3, 3), torch.nan)),
    }
    gates["half"].spatial_gate[0, 0, 0, :2] = torch.nan
    maps = AttentionMaps(gates, x)
    rendered(overlays := maps.overlays())
    constant, half, broken = (axis.get_title() for axis in grid(overlays, 4)[0][1:])
    assert constant == "constant\n3 x 3: 0.50 to 0.50"
    assert half.startswith("half\n3 x 3: 0.") and half.endswith(", 2 NaN")
    assert broken == "broken\n3 x 3: 9 NaN"
    assert len(bars(overlays)) == 3
    assert all(np.isfinite(axis.get_xlim()).all() for axis in bars(overlays))
    rendered(histograms := maps.histograms())
    assert [axis.get_title() for axis in histograms.axes] == [
        "constant\n4 gates, mean 0.50",
        "half\n1 gate, 1 NaN, mean 0.25",
        "broken\n0 gates, 4 NaN",
    ]


def test_histograms_count_every_channel_gate():
    maps = maps_of(5)
    figure = maps.histograms()
    assert len(figure.axes) == 5 and figure.get_suptitle() == "CBAM channel gates"
    for axis, (name, (gate, _)) in zip(figure.axes, maps.items(), strict=True):
        assert axis.get_title() == f"{name[:-5]}\n8 gates, mean {gate.mean():.2f}"
        counts = [round(patch.get_height()) for patch in axis.patches]
        assert counts == torch.histc(gate, 50, 0, 1).int().tolist() and sum(counts) == 8
        assert axis.get_xlim() == (0, 1)
        assert axis.lines[0].get_xdata()[0] == pytest.approx(gate.mean().item())
    rendered(figure)


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["a.cbam"], ["a.cbam"]),
        (["a.cbam", "b.cbam", "b.cbam#2"], ["a", "b", "b#2"]),
        (["a.cbam", "b"], ["a.cbam", "b"]),
        (["cbam", "b.cbam"], ["cbam", "b.cbam"]),
        (["decoder.blocks.0.attention2.attention"], ["decoder.blocks.0.attention2.\nattention"]),
        (["x" * 50 + ".y"], ["x" * 50 + ".\ny"]),
    ],
)
def test_titles(names, titles):
    gates = Gates(torch.rand(1, 4, 1, 1), torch.rand(1, 1, 2, 2))
    figure = AttentionMaps(dict.fromkeys(names, gates), images(1)).histograms()
    assert [axis.get_title().rpartition("\n")[0] for axis in figure.axes] == titles


def test_a_cbam_on_other_samples_than_the_images():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.parts = cbam_ext.CBAM(3), cbam_ext.CBAM(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.parts(torch.cat(self.whole(x).chunk(2, dim=3)))

    model, x = Windows(), images(1)
    maps = visualize(model, x)
    assert maps["parts"].spatial_gate.shape == (2, 1, 12, 8)
    assert len(maps.histograms().axes) == 2
    with pytest.raises(ValueError, match="parts ran on 2 samples.* 1 image: leave it out by vis"):
        maps.overlays()
    assert visualize(model, x, modules="whole").overlays().get_suptitle() == "CBAM spatial gates"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"max_images": 0}, "max_images must be at least 1, or None for all, got 0"),
        ({"max_modules": -1}, "max_modules must be at least 1, or None for all, got -1"),
    ],
)
def test_errors_of_overlays(options, message):
    with pytest.raises(ValueError, match=message):
        maps_of().overlays(**options)


def test_the_mapping():
    maps = maps_of(2)
    assert len(maps) == 2 and "stage.0.cbam" in maps and "stage" not in maps
    name, (channel, spatial) = next(iter(maps.items()))
    assert name == "stage.0.cbam" and channel is maps[name].channel_gate
    assert spatial is maps[name].spatial_gate
    assert repr(maps).splitlines() == [
        "AttentionMaps of 2 images",
        "  stage.0.cbam: channel gate [2, 4, 1, 1], spatial gate [2, 1, 8, 8]",
        "  stage.1.cbam: channel gate [2, 4, 1, 1], spatial gate [2, 1, 8, 8]",
    ]
    again = pickle.loads(pickle.dumps(maps))
    assert same_bits(again["stage.1.cbam"].spatial_gate, maps["stage.1.cbam"].spatial_gate)


def test_figures_save_and_show_in_notebooks(tmp_path):
    figure = maps_of().overlays()
    figure.savefig(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_no_pyplot_and_no_matplotlib_before_drawing():
    """In a process of its own, where no test has imported them."""
    code = """
import sys, torch
from cbam_ext import CBAM
from cbam_ext.visualization import visualize
maps = visualize(CBAM(3), torch.rand(1, 3, 8, 8))
assert not {"matplotlib", "torch.utils.tensorboard", "torch._dynamo"} & sys.modules.keys()
maps.overlays()._repr_png_(), maps.histograms()._repr_png_()
assert "matplotlib.pyplot" not in sys.modules
"""
    package = Path(cbam_ext.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("caller", ["overlays", "histograms"])
def test_without_matplotlib(caller, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    maps = visualize(plain(), images())
    with pytest.raises(ImportError, match=rf"{caller}\(\) needs matplotlib: pip install matplot"):
        getattr(maps, caller)()


# ------------------------------------------------------------------------------------ TensorBoard


class Recorder:
    def __init__(self) -> None:
        self.figures: dict[str, tuple[object, int | None]] = {}
        self.histograms: dict[str, tuple[Tensor, int | None]] = {}

    def add_figure(self, tag: str, figure: object, global_step: int | None = None) -> None:
        self.figures[tag] = figure, global_step

    def add_histogram(self, tag: str, values: Tensor, global_step: int | None = None) -> None:
        self.histograms[tag] = values, global_step


def test_write_to_anything_with_the_methods():
    maps, writer = maps_of(), Recorder()
    maps["stage.1.cbam"].channel_gate.fill_(torch.nan)
    maps["stage.1.cbam"].spatial_gate[0, 0, 0, 0] = torch.nan
    maps.write(writer, step=7, tag="gates")
    assert list(writer.figures) == ["gates/overlays"]
    figure, step = writer.figures["gates/overlays"]
    assert step == 7 and figure.get_suptitle() == "CBAM spatial gates"
    assert {tag: (len(values), step) for tag, (values, step) in writer.histograms.items()} == {
        "gates/channel_gate/stage.0.cbam": (8, 7),
        "gates/spatial_gate/stage.0.cbam": (128, 7),
        "gates/spatial_gate/stage.1.cbam": (127, 7),
    }
    maps.write(writer)
    assert writer.figures["cbam/overlays"][1] is None


@pytest.fixture
def summaries(tmp_path) -> Iterator[tuple[object, Callable[[], object]]]:
    """A writer of TensorBoard, and what reads its file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    yield writer, lambda: EventAccumulator(str(tmp_path)).Reload()
    writer.close()


def test_write_to_tensorboard(summaries):
    from matplotlib import pyplot

    writer, read = summaries
    maps = maps_of(1, names="stage")
    before = pyplot.get_fignums()  # of other tests
    maps.write(writer, step=3)
    writer.flush()
    events = read()
    (picture,) = events.Images("cbam/overlays")
    assert picture.step == 3 and picture.width > 400
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    for kind, gate in zip(Gates._fields, maps["stage"], strict=True):
        (histogram,) = events.Histograms(f"cbam/{kind}/stage")
        value = histogram.histogram_value
        assert histogram.step == 3 and value.num == gate.numel()
        assert (value.min, value.max) == pytest.approx((gate.min().item(), gate.max().item()))
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("method", ["add_figure", "add_histogram"])
def test_a_writer_without_a_method(method):
    writer = Recorder()
    setattr(writer, method, None)
    with pytest.raises(TypeError, match=f"writer must have a method {method}.*got Recorder"):
        maps_of().write(writer)
