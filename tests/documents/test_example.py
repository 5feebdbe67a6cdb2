"""examples/segment_coins.py: as a program, under torchrun, and its parts."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy import ndimage

import cbam_ext.smp

from support import forks
from support.packages import CHECKOUT

SCRIPT = CHECKOUT / "examples" / "segment_coins.py"
# As torchrun does, whose workers would each import everything again.
TORCHRUN = """
import runpy
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def run():
    runpy.run_path(sys.argv[0], run_name="__main__")

if __name__ == "__main__":
    sys.argv.pop(0)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", start_method="fork",
    )
    elastic_launch(config, run)()
"""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("segment_coins", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registered() -> Iterator[None]:
    cbam_ext.smp.register()
    yield
    cbam_ext.smp.unregister()


def assert_complete(done: subprocess.CompletedProcess[str], picture: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"Held-out IoU: \d\.\d{3}\n", done.stdout)) == 1, done.stdout
    rows = re.findall(r"^  (\w.*?) +(\d+\.\d) ms", done.stdout, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["cbam_ext", "plain PyTorch CBAM", "SCSE", "no attention"]
    assert all(float(milliseconds) > 0 for _, milliseconds in rows)
    assert "training: 100%" in done.stderr
    assert "plain PyTorch: the same results" not in done.stderr  # it ran on the kernels
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000


@pytest.mark.slow
def test_quick_run_prints_and_draws_into_a_new_folder(tmp_path):
    picture = tmp_path / "new" / "folder" / "coins.png"
    done = forks.with_smp().run(SCRIPT, "--quick", "--output", picture, "--threads", "1")
    assert_complete(done, picture)


@pytest.mark.slow
def test_torchrun_trains_in_two_processes_and_reports_once(tmp_path):
    picture = tmp_path / "coins.png"
    done = forks.with_smp().run(
        TORCHRUN, SCRIPT, "--quick", "--output", picture, "--threads", "1", CUDA_VISIBLE_DEVICES=""
    )
    assert_complete(done, picture)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "finds no GPU; use --device cpu"),
        (["--device", "toaster"], "toaster"),
        (["--size", "50"], "--size must be a multiple of 32"),
        (["--size", "512"], "from 32 to 256"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--output", "coins.gif"], "must end in .png"),
        (["--output", f"{SCRIPT}/coins.png"], "segment_coins.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_one_clear_line(example, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["segment_coins.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        example.parse_arguments()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_names_every_option(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["segment_coins.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        example.parse_arguments()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["segment_coins.py"])
    for name in vars(example.parse_arguments()):
        assert f"--{name}" in text


@pytest.mark.parametrize(
    "package", ["segmentation_models_pytorch", "skimage", "matplotlib", "tqdm"]
)
def test_a_missing_package_is_named_with_the_command(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    spec = importlib.util.spec_from_file_location("segment_coins_without", SCRIPT)
    with pytest.raises(SystemExit, match=rf'needs {package}.*pip install "cbam_ext\[demo\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_truth_is_24_whole_coins(example):
    image, mask = example.load_photograph()
    assert image.shape == mask.shape == (1, 1, 303, 384)
    labels, count = ndimage.label(mask[0, 0].numpy())
    assert count == 24
    # A round coin fills pi / 4 of its bounding box; holes or attached background do not.
    for rows, columns in ndimage.find_objects(labels):
        filled = mask[0, 0][rows, columns].mean().item()
        assert 0.65 < filled < 0.9


def test_training_never_sees_the_held_out_part(example, monkeypatch, tmp_path):
    image, mask = example.load_photograph()
    image[..., example.HELD_OUT :] = float("nan")
    seen = []

    def look(model, batches, *_, **__):
        for _ in range(50):
            images, masks = next(batches)
            assert images.isfinite().all() and set(masks.unique().tolist()) <= {0.0, 1.0}
            seen.append(images)
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "load_photograph", lambda: (image, mask))
    monkeypatch.setattr(example, "train", look)
    monkeypatch.setattr(
        sys, "argv", ["segment_coins.py", "--quick", "--output", str(tmp_path / "coins.png")]
    )
    with pytest.raises(KeyboardInterrupt):
        example.main()
    cbam_ext.smp.unregister()
    assert len(seen) == 50 and not torch.equal(seen[0], seen[1])


@pytest.mark.slow
def test_the_same_seed_trains_the_same_weights(example, registered):
    def train(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = example.make_unet("cbam")
        batches = example.random_batches(*example.load_photograph(), 2, 64, generator)
        example.train(model, batches, 2, torch.device("cpu"), show_progress=False)
        return list(model.parameters())

    first, second, other = train(1), train(1), train(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_a_full_run_below_the_target_fails(example, monkeypatch, tmp_path, capsys):
    options = ["--steps", "1", "--size", "32", "--batch", "2", "--repeats", "1"]
    picture = tmp_path / "coins.png"
    monkeypatch.setattr(sys, "argv", ["segment_coins.py", *options, "--output", str(picture)])
    monkeypatch.setattr(example, "intersection_over_union", lambda *_: 0.84)
    try:
        assert example.main() == 1
    finally:
        cbam_ext.smp.unregister()
    assert "below 0.85" in capsys.readouterr().err


def test_intersection_over_union(example):
    predicted = torch.tensor([0.9, 0.6, 0.4, 0.1])
    truth = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert example.intersection_over_union(predicted, truth) == pytest.approx(1 / 3)


def test_the_plain_model_is_the_same_function(example, registered):
    torch.manual_seed(0)
    ours = example.make_unet("cbam").double().eval()
    torch.manual_seed(0)
    plain = example.make_plain_unet().double().eval()
    for model in (ours, plain):  # gates that hang on their input
        torch.manual_seed(1)
        for parameter in model.decoder.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    assert sum(isinstance(m, example.PlainCBAM) for m in plain.modules()) == 9
    assert not any(isinstance(m, cbam_ext.CBAM) for m in plain.modules())
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-9, atol=1e-9)
