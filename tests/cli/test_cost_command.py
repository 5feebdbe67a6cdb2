"""`python -m cbam_ext cost`: its table, its JSON, its errors."""

from __future__ import annotations

import json
import re
import sys

import pytest
import segmentation_models_pytorch as smp
import torch

import cbam_ext.cost
import cbam_ext.smp
from cbam_ext.cli import cost as cost_command
from cbam_ext.cli import main
from cbam_ext.conversion.plain import is_plain_cbam
from cbam_ext.cost import Cost, CostTable, timing

ENCODER = "tu-mobilenetv3_small_050"
SMALL = ["--encoder", ENCODER, "--size", "64", "--rounds", "1", "--device", "cpu"]


@pytest.fixture
def hasty(monkeypatch):
    """Steps are hardly warmed up."""
    monkeypatch.setattr(timing.Stopwatch, "LONG", 0.0)


@pytest.fixture
def without_rounds(monkeypatch):
    """The command builds its models and measures nothing; it hands them over."""
    seen = {}

    def pretend(models, image, rounds):
        seen.update(models=models, image=image, rounds=rounds)
        turns = {name: [1.0 + i] for i, name in enumerate(models)}
        costs = {name: Cost(1, 2, 3, 4, 1.0 + i, 1.0 + i) for i, name in enumerate(models)}
        return CostTable(costs, next(iter(models)), turns, turns, "a device")

    monkeypatch.setattr(cost_command, "compare_costs", pretend)
    return seen


def test_command(hasty, capsys):
    original = smp.base.modules.Attention.__init__
    assert main(["cost", *SMALL]) == 0
    text = capsys.readouterr().out
    assert f"smp.Unet, encoder {ENCODER}" in text and "1x3x64x64 float32 contiguous" in text
    names = ["no attention", "scse", "plain CBAM", "cbam_ext"]
    rows = [line for line in text.splitlines() if line.startswith(tuple(names)) and " ms " in line]
    assert [row[:12].strip() for row in rows] == names
    plain, ours = (row[12:].split() for row in rows[2:])
    assert plain[:4] == ours[:4]  # parameters and FLOPs, with their units
    assert "over that of cbam_ext" in text and "\n  training " in text
    assert smp.base.modules.Attention.__init__ is original


@pytest.mark.slow
def test_command_as_json(hasty, capsys):
    arguments = [*SMALL, "--where", "bottleneck", "3", "--channels-last", "--dtype", "bfloat16"]
    assert main(["cost", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["models"]) == ["no attention", "plain CBAM", "cbam_ext"]
    assert found["input"] == [1, 3, 64, 64] and found["baseline"] == "no attention"
    assert (found["dtype"], found["layout"]) == ("bfloat16", "channels_last")
    assert "at bottleneck, 3" in found["attention"] and "scse" in found["notes"][0]
    base, plain, ours = found["models"].values()
    assert ours["parameters"] == plain["parameters"]
    channels = smp.encoders.get_encoder(ENCODER, weights=None).out_channels
    expected = sum(2 * c * max(1, c // 16) + 2 * 49 for c in (channels[5], channels[3]))
    assert ours["parameters"] - base["parameters"] == expected
    assert ours["flops"] == plain["flops"] > base["flops"]
    assert plain["activation_bytes"] > ours["activation_bytes"] > base["activation_bytes"]
    assert set(found["times_added"]["training"]) == {"plain CBAM"}


@pytest.mark.one_quick
@pytest.mark.parametrize("name", smp.MODEL_ARCHITECTURES_MAPPING)
def test_every_architecture_by_default(name, without_rounds, capsys):
    encoder = {"dpt": "tu-vit_tiny_patch16_224", "unetplusplus": "resnet18"}.get(name, ENCODER)
    size = {"dpt": "224", "pan": "128"}.get(name, "64")
    assert main(["--json", "cost", "--arch", name, "--encoder", encoder, "--size", size]) == 0
    found = json.loads(capsys.readouterr().out)
    models, image = without_rounds["models"], without_rounds["image"]
    assert ("scse" in models) == (found["arch"] in ("Unet", "UnetPlusPlus"))
    assert ("scse" in models) == (not found["notes"])
    for row, model in models.items():
        kinds = {type(module).__name__ for module in model.modules()}
        assert ("CBAM" in kinds) == (row == "cbam_ext")
        assert any(map(is_plain_cbam, model.modules())) == (row == "plain CBAM")
        assert ("SCSEModule" in kinds) == (row == "scse")
    # The batch is as small as training allows.
    model = models["no attention"].train()
    with torch.no_grad():
        model(image)
        if len(image) > 1:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                model(image[:1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_where_scse_cannot_run(without_rounds, capsys):
    # The decoder has 8 channels somewhere, of which SCSE makes 8 // 16 hidden ones.
    assert main(["cost", *SMALL, "--arch", "UnetPlusPlus"]) == 0
    assert list(without_rounds["models"]) == ["no attention", "plain CBAM", "cbam_ext"]
    assert "no row for scse: it needs 16 channels" in capsys.readouterr().out


@pytest.mark.slow
def test_command_keeps_a_registration(without_rounds):
    cbam_ext.smp.register()
    try:
        registered = smp.base.modules.Attention.__init__
        state = torch.get_rng_state()
        assert main(["cost", *SMALL]) == 0
        assert smp.base.modules.Attention.__init__ is registered
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        cbam_ext.smp.unregister()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--arch unett", "--arch: smp has no 'unett', but Unet"),
        ("--encoder resnet35", "--encoder: smp has no 'resnet35', but .*resnet34"),
        ("--encoder tu-resnet188", "--encoder: smp has no 'tu-resnet188', but .*tu-resnet18"),
        ("--arch UnetPlusPlus --encoder mit_b0", "UnetPlusPlus cannot be built with 'mit_b0'"),
        ("--arch FPN --where skips 9", "where=9"),
        ("--arch linknet --size 70", "1x3x70x70.*divisible by 32"),
        ("--arch DeepLabV3 --batch 1", "--batch 2"),
        ("--device nowhere", "argument --device: 'nowhere' cannot be used"),
        ("--size 3y3", "argument --size: '3y3' is not of the form"),
        ("--size 3x0", "argument --size: .*0 is not positive"),
        ("--rounds 0", "argument --rounds: 0 is not positive"),
    ],
)
def test_errors_of_the_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["cost", *SMALL, *arguments.split()])
    found = capsys.readouterr()
    assert stopped.value.code == 2 and not found.out
    assert re.search(message, found.err, re.DOTALL), found.err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    model = {"arch": "Unet", "encoder": ENCODER}
    monkeypatch.setattr(cost_command, "_build", lambda options: ({}, model))
    monkeypatch.setattr(cost_command, "compare_costs", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["cost", *SMALL])
    assert stopped.value.code == 1
    assert "out of memory: make --size or --batch smaller" in capsys.readouterr().err


def test_without_smp(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(SystemExit) as stopped:
        main(["cost", *SMALL])
    assert stopped.value.code == 1
    assert "pip install segmentation-models-pytorch" in capsys.readouterr().err


def test_help(capsys):
    for arguments, expected in ((["--help"], "{plan,cost}"), (["cost", "--help"], "examples:")):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0 and expected in capsys.readouterr().out
