"""python -m bench: what it makes of times. No test here looks at how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import cbam_ext
from cbam_ext.cost.timing import Stopwatch

from bench import baselines, measure, report, traffic
from bench.measure import Row

CPU = torch.device("cpu")
MB = 2**20

# ------------------------------------------------------------------------------ cold, warm, turns


@pytest.mark.parametrize("buffer_bytes", [401_408, 12 * MB, 200 * MB, 1])
def test_rotation_goes_through_more_than_the_cache(buffer_bytes: int) -> None:
    cache = 50 * MB
    count = measure.buffers_beyond(cache, buffer_bytes)
    # What comes between two uses of a buffer is more than the cache holds.
    assert (count - 1) * buffer_bytes > cache
    assert count >= 2


class Seen(nn.Module):
    """Remembers where its inputs, results and gradients lie."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.gradients: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        output = x * 2
        self.inputs.append(x.data_ptr())
        self.outputs.append(output.data_ptr())
        if x.requires_grad and self.inputs.count(x.data_ptr()) == 1:
            x.register_post_accumulate_grad_hook(
                lambda leaf: self.gradients.append(leaf.grad.data_ptr())
            )
        return output


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("count", [1, 4])
def test_steps_rotate_through_their_buffers(direction: str, count: int) -> None:
    inputs = [torch.randn(1, 2, 64, 64) for _ in range(count)]
    module = Seen()
    step = measure._steps(direction, {"ours": module}, inputs)["ours"]
    for _ in range(3 * count):
        step()
    places = [x.data_ptr() for x in inputs]
    assert module.inputs == places * 3
    # A result is kept until its place comes again, so that no memory comes back before.
    for begin in range(2 * count):
        assert len(set(module.outputs[begin : begin + count])) == count
        if direction != "forward":
            assert len(set(module.gradients[begin : begin + count])) == count


def test_copies_rotate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Tensor] = []

    def empty_like(x: Tensor) -> Tensor:
        targets.append(torch.zeros(x.shape))
        return targets[-1]

    monkeypatch.setattr(torch, "empty_like", empty_like)
    inputs = [torch.full((3,), float(i + 1)) for i in range(3)]
    step = measure._copy(inputs)
    for _ in range(3):
        step()
    assert [target.tolist() for target in targets] == [x.tolist() for x in inputs]


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nand so on")


class Once(Stopwatch):
    """Runs each step once and says that it took a second."""

    def prepare(self, step: object) -> int:
        step()
        return 1

    def time(self, step: object, repeats: int) -> float:
        step()
        return 1.0


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "stopwatch", lambda device: Once())


@pytest.mark.usefixtures("no_clock")
def test_a_baseline_that_fails_costs_its_column_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def no_such_package(channels: int) -> nn.Module:
        raise ImportError("no timm")

    modules = {
        "ours": cbam_ext.CBAM,
        "eager": baselines.EagerCBAM,
        "compile": lambda channels: Failing(),
        "timm": no_such_package,
    }
    rows = measure.measure_problem((1, 16, 4, 4), "float32", "nchw", modules, CPU, 2)
    assert [(row.direction, row.cache) for row in rows] == [
        ("forward", "warm"),
        ("forward+backward", "warm"),
    ]
    for row in rows:
        assert row.ratios == {"ours": 1.0, "eager": 1.0, "copy": 1.0}
    error = capsys.readouterr().err
    assert "leaving out compile: RuntimeError: no compiler\n" in error
    assert "leaving out timm: ImportError: no timm" in error


@pytest.mark.usefixtures("no_clock")
def test_that_ours_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no compiler"):
        measure.measure_problem(
            (1, 16, 4, 4), "float32", "nchw", {"ours": lambda channels: Failing()}, CPU, 1
        )


# ------------------------------------------------------------------------------------- bandwidth


def test_peak_bandwidth() -> None:
    def of(**facts: object) -> tuple[float, str] | None:
        return traffic.peak_bandwidth(SimpleNamespace(**facts))

    h100 = of(name="NVIDIA H100 80GB HBM3", memory_clock_rate=2_619_000, memory_bus_width=5120)
    assert h100 is not None
    assert h100[0] == pytest.approx(3.352e12, rel=1e-3)
    assert of(name="NVIDIA H100 80GB HBM3") == (3.35e12, "the data sheet")
    assert of(name="NVIDIA H200", memory_clock_rate=0) == (4.8e12, "the data sheet")
    assert of(name="an unknown one", memory_clock_rate=0, memory_bus_width=0) is None


def row(direction: str = "forward", cache: str = "cold", **milliseconds: float) -> Row:
    ratios = {name: value / milliseconds["ours"] for name, value in milliseconds.items()}
    return Row(
        *((2, 3, 4, 5), "float32", "nchw", direction, cache, milliseconds, ratios),
        input_bytes=1_000_000,
    )


@pytest.mark.parametrize(("direction", "share"), [("forward", 0.2), ("forward+backward", 0.5)])
def test_share_of_peak(direction: str, share: float) -> None:
    """Two passes of a megabyte in 10 us are 0.2 TB/s; five are 0.5."""
    one = row(direction, ours=0.01)
    assert one.bandwidth_share(1e12, traffic.FEWEST_PASSES) == pytest.approx(share)


# ---------------------------------------------------------------------------------------- results


def results(
    *rows: Row, baselines: list[str], device: str = "cuda", **more: object
) -> report.Results:
    return report.Results(list(rows), baselines, torch.device(device), **more)


def cells(table: str, line: int) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


def test_a_table_of_a_gpu() -> None:
    cold, warm = row(ours=0.01, eager=0.05, copy=0.005), row(cache="warm", ours=0.005, copy=0.005)
    bandwidth = {"copy": 5e11, "peak": 1e12}
    table = results(cold, warm, baselines=["eager"], bandwidth=bandwidth).table()
    first = dict(zip(cells(table, 0), cells(table, 2), strict=True))
    second = dict(zip(cells(table, 0), cells(table, 3), strict=True))
    assert (first["cache"], second["cache"]) == ("cold", "warm")
    assert (first["ms"], second["ms"]) == ("0.010", "0.005")
    assert (first["x eager"], second["x eager"]) == ("5.0", "")
    assert (first["copies"], second["copies"]) == ("2.0", "1.0")
    assert (first["floor"], first["of peak"]) == ("40%", "20%")


def test_a_table_of_a_cpu_has_no_caches() -> None:
    one = row(cache="warm", ours=0.01, copy=0.005)
    table = results(one, baselines=[], device="cpu").table()
    assert "cache" not in cells(table, 0)
    assert "of peak" not in cells(table, 0)


def test_rows_are_shown_by_dtype_and_layout() -> None:
    """Whatever the order in which they were measured."""
    measured = []
    for shape in ((1, 1, 1, 1), (2, 2, 2, 2)):
        for dtype in ("float32", "bfloat16"):
            for direction in measure.DIRECTIONS:
                figures = {"ours": 1.0, "copy": 1.0}
                measured.append(Row(shape, dtype, "nchw", direction, "warm", figures, figures))
    table = results(*measured, baselines=[], device="cpu").table()
    assert [cells(table, 2 + i)[:2] for i in range(0, 8, 2)] == [
        ["1x1x1x1", "float32"],
        ["2x2x2x2", "float32"],
        ["1x1x1x1", "bfloat16"],
        ["2x2x2x2", "bfloat16"],
    ]


def test_a_run_adds_to_an_earlier_one(tmp_path: Path) -> None:
    rows = [row(ours=2.0, eager=8.0, copy=1.0), row("forward+backward", ours=3.0, copy=1.0)]
    results(*rows, baselines=["eager"], device="cpu").write(tmp_path / "benchmark")
    second = results(baselines=["autotuned"], device="cpu")
    second.resume(tmp_path / "benchmark.json")
    second.put(row(ours=1.0, autotuned=3.0, copy=1.0))
    second.put(row(cache="warm", ours=0.5, copy=1.0))
    assert second.baselines == ["eager", "autotuned"]
    assert [r.milliseconds for r in second.rows] == [
        {"ours": 1.0, "eager": 8.0, "autotuned": 3.0, "copy": 1.0},
        {"ours": 3.0, "copy": 1.0},
        {"ours": 0.5, "copy": 1.0},
    ]
    # Each ratio is that of the run which measured it.
    assert second.rows[0].ratios == {"ours": 1.0, "eager": 4.0, "autotuned": 3.0, "copy": 1.0}
    second.write(tmp_path / "benchmark")
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(written["rows"]) == 3


def test_results_of_another_machine_are_not_added_to(tmp_path: Path) -> None:
    results(row(ours=2.0, copy=1.0), baselines=[], device="cpu").write(tmp_path / "benchmark")
    path = tmp_path / "benchmark.json"
    data = json.loads(path.read_text())
    data["environment"]["device"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="another device"):
        results(baselines=[], device="cpu").resume(path)


# -------------------------------------------------------------------------------------- baselines


def test_scse_is_that_of_smp() -> None:
    modules = pytest.importorskip("segmentation_models_pytorch.base.modules")
    theirs, ours = modules.SCSEModule(32), baselines.SCSE(32)
    for target, source in zip(ours.parameters(), theirs.parameters(), strict=True):
        target.data.copy_(source.data)
    x = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_scse_is_what_its_paper_says() -> None:
    module, x = baselines.SCSE(32), torch.randn(2, 32, 5, 6)
    _, squeeze, _, excite, _ = module.channel
    hidden = squeeze.weight[..., 0, 0] @ x.mean((2, 3)).T + squeeze.bias[:, None]
    gate = (excite.weight[..., 0, 0] @ hidden.relu() + excite.bias[:, None]).T.sigmoid()
    weight, bias = module.spatial[0].weight[0, :, 0, 0], module.spatial[0].bias
    spatial = (torch.einsum("nchw,c->nhw", x, weight) + bias).sigmoid()
    torch.testing.assert_close(module(x), x * gate[..., None, None] + x * spatial[:, None])
