"""examples/placement_study.py: what it reads, how it trains and goes on, and what it claims."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cbam_ext.smp
from cbam_ext.cost import timing

from support import forks
from support.packages import CHECKOUT

STUDY = CHECKOUT / "examples" / "placement_study.py"
TINY = ["--encoder", "tu-mobilenetv3_small_050", "--size", "32", "--batch", "2", "--rounds", "1"]
TINY += ["--threads", "1", "--device", "cpu", "--steps", "3", "--seeds", "2"]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    threads = torch.get_num_threads()
    cbam_ext.smp.register()
    yield
    cbam_ext.smp.unregister()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are hardly warmed up: what they cost is not asked here."""
    monkeypatch.setattr(timing.Stopwatch, "LONG", 0.0)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return make_folders(tmp_path)


def make_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Images with a bright square each, and masks of these squares; always the same."""
    generator = np.random.default_rng(7)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(4):
        mask = np.zeros((40, 52), np.uint8)
        top, left = generator.integers(0, 20, 2)
        mask[top : top + 18, left : left + 18] = 255
        image = generator.integers(0, 90, (40, 52, 3)) + (mask // 2)[..., None]
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "images" / f"{number}.jpg")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path / "images", tmp_path / "masks"


def arguments(folders: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    images, masks = folders
    given = ["--images", images, "--masks", masks, "--output", output, *TINY, *more]
    return [str(each) for each in given]


def results(output: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in (output / "runs").glob("*.json")}


# ------------------------------------------------------------------------------ the whole program


def test_it_writes_a_table_and_pictures_and_computes_nothing_twice(
    program, folders, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "out"
    more = ["--places", "scse", "skips+decoder", "--init", "default", "0.9"]
    assert program.main(arguments(folders, output, *more)) == 0
    told = capsys.readouterr()
    text = (output / "study.md").read_text()
    assert text.strip() in told.out
    names = ["none", "scse", "skips+decoder, default", "skips+decoder, 0.9"]
    lines = text.splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == names and {len(row) for row in rows} == {8}
    assert "3 images of" in text and "1 more held out, 2 classes" in text and "smp.Unet" in text
    found = results(output)
    assert len(found) == 8 and all(len(each["losses"]) == 3 for each in found.values())
    for row, name in zip(rows, names, strict=True):
        ious = [found[f"{name.replace(', ', '-')}-{seed}.json"]["iou"] for seed in (0, 1)]
        assert row[1].strip().startswith(f"{np.mean(ious):.3f} ± {np.std(ious, ddof=1):.3f}")
    for picture in ("benefit.png", "curves.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob("*.tmp")) and not list(output.rglob("*.part"))

    def never(*_: Any) -> None:
        raise AssertionError("trained or timed again")

    monkeypatch.setattr(program.runs, "train", never)
    monkeypatch.setattr(program.cbam_ext, "compare_costs", never)
    (output / "study.md").unlink()
    assert program.main(arguments(folders, output, *more)) == 0
    assert (output / "study.md").read_text() == text


def test_more_seeds_and_places_keep_what_is_there(program, folders, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert program.main(arguments(folders, output, "--places", "none", "--seeds", "1")) == 0
    trained, train = [], program.runs.train

    def noted(variant, seed, *others):
        trained.append((str(variant), seed))
        return train(variant, seed, *others)

    monkeypatch.setattr(program.runs, "train", noted)
    assert program.main(arguments(folders, output, "--places", "blocks")) == 0
    assert trained == [("blocks, identity", 0), ("none", 1), ("blocks, identity", 1)]


@pytest.mark.slow
def test_the_coins_as_a_program(tmp_path):
    done = forks.with_smp().run(
        STUDY, *TINY, "--places", "blocks", "--seeds", "1", "--output", tmp_path / "new" / "folder"
    )
    assert done.returncode == 0, done.stderr
    assert "photograph of coins" in done.stdout and "One seed has no spread" in done.stdout
    assert "run 2 of 2" in done.stderr


# ------------------------------------------------------------------------------ going on


class Interrupted:
    """``tell`` that is interrupted at a step of a run, as by Ctrl-C."""

    def __init__(self, program: ModuleType, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        train = program.runs.train
        self.steps = 0

        def interrupted(variant, seed, settings, data, folder, tell):
            def counted(step: int, loss: float) -> None:
                tell(step, loss)
                self.steps += 1
                if self.steps == at:
                    raise KeyboardInterrupt

            return train(variant, seed, settings, data, folder, counted)

        monkeypatch.setattr(program.runs, "train", interrupted)


def test_an_interrupted_study_ends_as_if_it_had_not_been(
    program, folders, tmp_path, capsys, monkeypatch
):
    more = ["--places", "blocks", "--seeds", "1"]
    assert program.main(arguments(folders, tmp_path / "whole", *more)) == 0
    monkeypatch.setattr(program.runs, "KEPT_EVERY", -1)  # after each step
    for at in (2, 2, 3):  # in the first run, again in it, in the second
        with monkeypatch.context() as patch:
            Interrupted(program, patch, at)
            assert program.main(arguments(folders, tmp_path / "broken", *more)) == 130
        assert "the same command goes on from here" in capsys.readouterr().err.splitlines()[-1]
    with monkeypatch.context() as patch:
        after = Interrupted(program, patch, at=0)
        assert program.main(arguments(folders, tmp_path / "broken", *more)) == 0
    # The steps in which it was interrupted had not been kept: 1, then 2, then 1 of the second run.
    assert after.steps == 2
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_study_goes_on(folders, tmp_path):
    processes, killed = forks.with_smp(), tmp_path / "killed"

    def command(output: Path) -> list[str | Path]:
        return [STUDY, *arguments(folders, output, "--places", "blocks", "--steps", "4")]

    def run(output: Path) -> None:
        done = processes.run(*command(output))
        assert done.returncode == 0, done.stderr

    run(tmp_path / "whole")
    processes.start(*command(killed))
    try:
        while processes.running() and len(list(killed.glob("runs/*.json"))) < 2:
            time.sleep(0.01)
    finally:
        processes.kill()
    run(killed)
    assert results(killed) == results(tmp_path / "whole")


def test_nothing_is_half_written(program, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    program.runs.write(path, b"before")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            program.runs.write(path, b"after")
    assert path.read_bytes() == b"before"


@pytest.fixture(scope="module")
def finished(program: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a study of one model has left behind."""
    folder = tmp_path_factory.mktemp("finished")
    given = arguments(make_folders(folder), folder / "out", "--places", "none")
    assert program.main(given) == 0
    return folder / "out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--steps", "4"], "whose steps is 3 and not 4; name another --output, or delete"),
        (["--lr", "0.01"], "whose lr is 0.001 and not 0.01"),
        (["--arch", "FPN"], "whose arch is Unet and not FPN"),
        (None, "whose data is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_results_of_another_study_are_not_mixed_in(
    change, message, program, finished, folders, tmp_path, capsys
):
    output = shutil.copytree(finished, tmp_path / "out")
    before = results(output)
    assert len(before) == 2
    if change is None:  # one pixel of one image
        path = folders[0] / "0.jpg"
        image = np.asarray(Image.open(path)).copy()
        image[0, 0] += 100
        Image.fromarray(image).save(path.with_suffix(".png"))
        path.unlink()
    capsys.readouterr()
    assert program.main(arguments(folders, output, "--places", "none", *(change or []))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert results(output) == before


def test_a_damaged_result_is_named(program, finished, folders, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "out")
    (output / "runs" / "none-0.json").write_text("{}")
    capsys.readouterr()
    assert program.main(arguments(folders, output, "--places", "none", "--seeds", "1")) == 2
    assert "none-0.json is damaged" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what is compared


def test_runs_of_a_seed_share_weights_and_crops(program, folders, tmp_path):
    data = program.read_pairs(*folders)
    given = program.parse_arguments(arguments(folders, tmp_path))
    names = ("arch", "encoder", "weights", "steps", "size", "batch", "lr")
    settings = program.Settings(**{n: getattr(given, n) for n in names}, device="cpu", data="")
    variants = program.variants_of(given)
    assert [v.place for v in variants] == program.runs.places_of("Unet")
    plain = program.runs.build(variants[0], settings, data, seed=3).state_dict()
    other = program.runs.build(variants[0], settings, data, seed=4).state_dict()
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    for variant in variants[1:]:
        held = program.runs.build(variant, settings, data, seed=3).state_dict()
        assert held.keys() > plain.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in plain.items()), variant
    batches = [
        next(program.random_batches(data.train, 2, 32, torch.Generator().manual_seed(seed)))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][0], batches[2][0])


def test_crops_and_their_masks_belong_together(program):
    """An image whose pixels are its classes stays so under every crop, turn and flip."""
    mask = (torch.arange(60)[:, None] // 20 + 3 * (torch.arange(70) // 35)).byte()
    pair = program.Pair("", mask[None].float(), mask)
    batches = program.random_batches([pair], 8, 32, torch.Generator().manual_seed(1))
    images, masks = (
        torch.cat(each) for each in zip(*(next(batches) for _ in range(4)), strict=True)
    )
    assert images.shape == (32, 1, 32, 32) and masks.shape == (32, 32, 32)
    assert masks.dtype == torch.int64
    for image, crop in zip(images, masks, strict=True):
        found = torch.stack([image[0].flatten(), crop.flatten().float()])
        assert torch.corrcoef(found)[0, 1] > 0.9 or crop.unique().numel() == 1


@pytest.mark.parametrize("classes", [2, 3])
def test_the_measure_is_that_of_the_whole_held_out_set(classes, program):
    generator = torch.Generator().manual_seed(5)
    shapes = [(33, 40), (64, 32)]
    pairs = [
        program.Pair("", torch.rand(3, *s, generator=generator),
                     torch.randint(0, classes, s, generator=generator).byte())
        for s in shapes
    ]  # fmt: skip
    data = program.Data(pairs, pairs, classes, "")
    model = torch.nn.Conv2d(3, data.outputs, 1)
    found = program.runs.held_out_iou(model, data, "cpu")
    predicted, true = [], []
    for pair in pairs:
        logits = model(pair.standardised()[None])[0]
        predicted.append(((logits[0] > 0).long() if classes == 2 else logits.argmax(0)).flatten())
        true.append(pair.mask.flatten())
    p, t = torch.cat(predicted), torch.cat(true)
    ious = [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in range(classes)]
    expected = ious[1] if classes == 2 else sum(ious) / classes
    assert found == pytest.approx(float(expected), rel=1e-6)


# ------------------------------------------------------------------------------ bad inputs


def picture(path: Path, array: np.ndarray) -> None:
    for old in path.parent.glob(f"{path.stem}.*"):
        old.unlink()
    Image.fromarray(array).save(path)


def spoil(kind: str, images: Path, masks: Path) -> None:
    """Makes one thing wrong with the data."""
    blank = np.zeros((40, 52), np.uint8)
    if kind == "no folder":
        shutil.rmtree(images)
    elif kind == "no images":
        for path in images.iterdir():
            path.rename(path.with_suffix(".txt"))
    elif kind == "no pairs":
        for path in masks.iterdir():
            path.rename(path.with_name(f"mask{path.name}"))
    elif kind == "a mask is missing":
        (masks / "2.png").unlink()
    elif kind == "one pair":
        for number in range(1, 4):
            (images / f"{number}.jpg").unlink()
    elif kind == "other size":
        picture(masks / "1.png", np.zeros((52, 40), np.uint8))
    elif kind == "one class":
        for number in range(4):
            picture(masks / f"{number}.png", blank + 7)
    elif kind == "one class held out":
        for number in range(1, 4):
            picture(masks / f"{number}.png", blank)
    elif kind == "photographs for masks":
        for number in range(4):
            picture(masks / f"{number}.png", np.arange(2080).reshape(40, 52).astype(np.uint8))
    elif kind == "coloured":
        picture(masks / "0.png", np.stack([blank, blank + 255, blank], -1))
    elif kind == "no picture":
        (masks / "0.png").write_bytes(b"nothing of the kind")
    elif kind == "two of a name":
        picture(images / "one.png", np.stack([blank] * 3, -1))
        shutil.copy(images / "one.png", images / "0.png")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", "--images: there is no folder"),
        ("no images", "has no images (.bmp"),
        ("no pairs", "no pairs: an image and its mask need the same name"),
        ("a mask is missing", "1 of 4 images have no mask: 2.jpg"),
        ("one pair", "has one image alone; a second one is needed"),
        ("other size", "1.jpg is 52 x 40 pixels and its mask 40 x 52"),
        ("one class", "the masks have one class only: 7 in every pixel"),
        ("one class held out", "the class number 1 is in 1 of them"),
        ("photographs for masks", "the masks have 256 different values"),
        ("coloured", "0.png is coloured"),
        ("no picture", "0.png cannot be read"),
        ("two of a name", "0.jpg and 0.png have one name"),
    ],
    ids=lambda value: value,
)
def test_data_that_cannot_be_learnt_ends_with_one_clear_line(
    kind, message, program, folders, tmp_path, capsys
):
    spoil(kind, *folders)
    assert program.main(arguments(folders, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("placement_study: ") and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arch", "Resnet"], "--arch: smp has no Resnet; it has DPT, DeepLabV3"),
        (["--encoder", "resnet17"], "Unet with resnet17 and none: "),
        (["--places", "middle"], "--places: Unet has no place middle; it has none, scse, blocks"),
        (["--arch", "FPN", "--places", "blocks"], "FPN has no place blocks"),
        (["--places", "7", "--seeds", "1"], "no where=7"),
        (["--compare-with", "blocks, 0.2"], "there is no blocks, 0.2, but none; scse; blocks, id"),
        (["--device", "toaster"], "--device: "),
        (["--output", __file__], "--output: "),
    ],
    ids=lambda value: (
        " ".join(map(str, value[:2])).replace(__file__, "file") if isinstance(value, list) else ""
    ),
)
def test_what_cannot_be_studied_ends_with_one_clear_line(
    more, message, program, folders, tmp_path, capsys
):
    assert program.main(arguments(folders, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seeds", "-1"], "--seeds must be at least 1"),
        (["--size", "50"], "--size must be a multiple of 32"),
        (["--lr", "0"], "--lr must be a positive number"),
        (["--lr", "nan"], "--lr must be a positive number"),
        (["--init", "1.5"], "1.5 is not identity, default or between 0 and 1"),
        (["--images", "photos"], "--images and --masks go together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_one_clear_line(given, message, program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.parse_arguments(given)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------ kinds of files


def test_kinds_of_images_and_masks(program, folders):
    images, masks = folders
    deep = (np.arange(2080).reshape(40, 52) * 31).astype(np.uint16)
    picture(images / "0.png", deep)
    values = np.asarray(Image.open(masks / "1.png"))
    palette = Image.fromarray((values > 0).astype(np.uint8) * 255).convert("P")
    (masks / "1.png").unlink()
    palette.save(masks / "1.png")
    picture(images / "2.png", np.zeros((40, 52, 4), np.uint8))
    rotated = Image.fromarray(np.zeros((52, 40, 3), np.uint8))  # upright by its EXIF tag alone
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(images / "3.jpg", exif=exif)
    data = program.read_pairs(images, masks)
    pairs = {pair.name: pair for pair in (*data.train, *data.held_out)}
    assert {pair.image.shape for pair in pairs.values()} == {(3, 40, 52)}
    assert torch.equal(pairs["0"].image[0], torch.from_numpy(deep.astype(np.float32)))
    assert data.classes == 2 and data.outputs == 1
    assert set(pairs["1"].mask.unique().tolist()) == {0, 1}
    assert pairs["2"].standardised().isfinite().all()


def test_more_classes_than_two(program, folders, tmp_path):
    for path in folders[1].iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[:8, :8] = 100
        picture(path, mask)
    data = program.read_pairs(*folders)
    assert data.classes == data.outputs == 3
    assert program.main(arguments(folders, tmp_path / "out", "--places", "none")) == 0
    assert all(0 <= each["iou"] <= 1 for each in results(tmp_path / "out").values())
