"""Other people's CBAM becomes ours with the same outputs, gradients and statistics, or stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cbam_ext
from cbam_ext.conversion import walk

from support import peers
from support.conversions import RESIDUAL, WHOLE, assert_equal, draw, shake, step, timm_cbam

timm = pytest.importorskip("timm")


# ----------------------------------------------------------------------------- one module at a time


@pytest.mark.parametrize("name", WHOLE)
def test_whole_modules(name: str, generator: torch.Generator) -> None:
    make, channels, hidden, kernel = WHOLE[name]
    theirs = shake(make(), generator).double()
    ours, report = cbam_ext.convert(theirs, return_report=True)

    assert type(ours) is (cbam_ext.Residual if name in RESIDUAL else cbam_ext.CBAM)
    cbam = ours.cbam if name in RESIDUAL else ours
    assert (cbam.in_channels, cbam.hidden_channels, cbam.kernel_size) == (channels, hidden, kernel)
    (done,) = report.converted
    assert (done.name, done.kind, report.left) == ("", type(theirs).__name__, [])
    assert done.error is not None and done.error < 1e-12

    x = draw(channels, generator, height=1 if name == "braindecode" else 9)
    with torch.no_grad():
        assert_equal([theirs.eval()(x)], [ours.eval()(x)])
    assert_equal(step(theirs, x), step(ours, x))


@pytest.mark.parametrize("name", ["timm", "authors", "mmyolo", "External-Attention"])
def test_parameters_train_alike(name: str, generator: torch.Generator) -> None:
    """Some steps of an optimiser, after which outputs agree still."""
    make, channels, _, _ = WHOLE[name]
    theirs = shake(make(), generator).double()
    ours = cbam_ext.convert(theirs)
    results = []
    x, target = draw(channels, generator), draw(channels, generator)
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.train().parameters(), 0.3, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            optimizer.step()
        results.append([module(x).detach()])
    assert_equal(*results)


def test_what_the_replacement_keeps(generator: torch.Generator) -> None:
    theirs = peers.AuthorsCBAM(32).bfloat16().eval()
    theirs.SpatialGate.spatial.bn.momentum = 0.3
    theirs.SpatialGate.spatial.bn.eps = 0.02
    theirs.ChannelGate.mlp[1].requires_grad_(False)
    before = copy.deepcopy(theirs.state_dict())
    ours = cbam_ext.convert(theirs)
    assert not any(module.training for module in ours.modules())
    assert {t.dtype for t in ours.parameters()} == {torch.bfloat16}
    assert (ours.spatial.norm.momentum, ours.spatial.norm.eps) == (0.3, 0.02)
    assert not ours.channel.fc1.weight.requires_grad
    assert not ours.channel.fc1.bias.requires_grad
    assert ours.channel.fc2.weight.requires_grad
    x = draw(32, generator).bfloat16()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.03, atol=0.03)
    with torch.no_grad():  # a copy: the original has its own weights
        for parameter in ours.parameters():
            parameter.zero_()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_timm_norm_becomes_a_plain_one() -> None:
    """timm's subclass would keep the fused path from a norm that trains."""
    assert type(cbam_ext.convert(timm_cbam(8)).spatial.norm) is nn.BatchNorm2d


def test_sync_batch_norm_stays() -> None:
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(peers.AuthorsCBAM(32))
    ours = cbam_ext.convert(theirs)
    assert type(ours) is cbam_ext.CBAM
    assert type(ours.spatial.norm) is nn.SyncBatchNorm


def test_random_state_is_left_alone() -> None:
    module = peers.AuthorsCBAM(32)
    before = torch.get_rng_state()
    cbam_ext.convert(module)
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------- left alone


class Detached(peers.LuuuyiWhole):
    def forward(self, x: Tensor) -> Tensor:
        x = x * self.ca(x.detach())
        return x * self.sa(x)


class Dropped(peers.LuuuyiWhole):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Parallel(peers.LuuuyiWhole):
    """Both gates of the input, not one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.ca(x) * self.sa(x)


class Halved(peers.LuuuyiWhole):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Masked(peers.LuuuyiWhole):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


class Scaled(peers.LuuuyiWhole):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(()))


def hooked() -> nn.Module:
    module = peers.AuthorsCBAM(32)
    module.SpatialGate.register_forward_hook(lambda *_: None)
    return module


def parametrized() -> nn.Module:
    module = peers.AuthorsCBAM(32)
    nn.utils.parametrizations.weight_norm(module.ChannelGate.mlp[1])
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lcbam": (lambda: timm_cbam(24, "lcbam"), "sees one map"),
    "lse": (
        lambda: peers.AuthorsCBAM(32, pool_types=("avg", "max", "lse")),
        "pools by avg, max, lse",
    ),
    "lp": (lambda: peers.AuthorsCBAM(32, pool_types=("lp", "max")), "pools by lp, max"),
    "avg alone": (lambda: peers.AuthorsCBAM(32, pool_types=("avg",)), "pools by avg, CBAM"),
    "SiLU": (lambda: peers.MmyoloCBAM(32, activation=nn.SiLU()), "contains SiLU"),
    "ReLU6": (lambda: peers.MmyoloCBAM(32, activation=nn.ReLU6()), "contains ReLU6"),
    "leaky": (lambda: peers.MmyoloCBAM(32, activation=nn.LeakyReLU()), "contains LeakyReLU"),
    "hard gate": (lambda: timm_cbam(24, gate_layer="hard_sigmoid"), "contains Hardsigmoid"),
    "ultralytics": (lambda: peers.UltralyticsCBAM(32), "a single 32 x 32 layer"),
    "two MLPs": (lambda: peers.TwoMlpsCBAM(32), "4 dense layers"),
    "no hidden unit": (lambda: peers.AuthorsCBAM(8), "no hidden unit"),
    "avg alone, no spatial gate": (
        lambda: peers.AuthorsCBAM(32, pool_types=("avg",), no_spatial=True),
        "pools by avg, CBAM",
    ),
    "even kernel": (lambda: peers.MmyoloCBAM(32, kernel_size=4), "even size"),
    "detached": (lambda: Detached(32), "in training it computes something else"),
    "dropout": (lambda: Dropped(32), "draws random numbers in training"),
    "parallel": (lambda: Parallel(32), "computes something else"),
    "halved": (lambda: Halved(32), "computes something else"),
    "mask": (lambda: Masked(32), "takes more than one argument"),
    "hooks": (hooked, "has hooks"),
    "weight norm": (parametrized, "parametrized"),
    "scripted": (lambda: torch.jit.script(timm_cbam(24)), "scripted"),
    "meta": (lambda: peers.AuthorsCBAM(32).to("meta"), "meta device"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    make, reason = LEFT[name]
    module = make()
    model = nn.Sequential(nn.Conv2d(3, 32, 1), module)
    found, report = cbam_ext.convert(model, inplace=True, return_report=True)
    assert found is model and model[1] is module
    assert report.converted == []
    (left,) = report.left
    assert (left.name, left.kind) == ("1", type(module).__name__)
    assert reason in left.reason
    assert left.reason in str(report)


def test_an_extra_parameter(generator: torch.Generator) -> None:
    """What is around it is not that of a CBAM, but the product of its gates may be one."""
    theirs = shake(Scaled(32), generator).double()
    ours, report = cbam_ext.convert(theirs, return_report=True)
    x = draw(32, generator)
    assert_equal([theirs(x)], [ours(x)])
    assert len(report.converted) + len(report.left) == 1


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))])
def test_nothing_to_convert(model: nn.Module) -> None:
    found, report = cbam_ext.convert(model, inplace=True, return_report=True)
    assert found is model
    assert str(report) == "converted 0, left 0"


def test_an_attention_of_another_kind_is_no_cbam() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="scse")
    assert str(cbam_ext.convert(model, return_report=True)[1]) == "converted 0, left 0"


def test_ours_is_not_converted_again() -> None:
    model = nn.Sequential(cbam_ext.CBAM(8), cbam_ext.Residual(cbam_ext.CBAM(8)))
    found, report = cbam_ext.convert(model, inplace=True, return_report=True)
    assert [type(m) for m in found] == [cbam_ext.CBAM, cbam_ext.Residual]
    assert str(report) == "converted 0, left 0"


def test_errors() -> None:
    with pytest.raises(TypeError, match="convert: model must be a torch.nn.Module, got dict"):
        cbam_ext.convert({})  # type: ignore[arg-type]


def test_a_deviation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "deviation", lambda *_: 1e-3)
    model = nn.Sequential(timm_cbam(8))
    with pytest.raises(RuntimeError, match=r"the output of 0 would change by 1.0e-03"):
        cbam_ext.convert(model)
    _, report = cbam_ext.convert(model, check=False, return_report=True)
    assert report.converted[0].error is None


# ------------------------------------------------------------------------------------ whole models


def test_inplace_and_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 1), timm_cbam(24))
    original = model[1]
    found = cbam_ext.convert(model)
    assert found is not model and model[1] is original and type(found[1]) is cbam_ext.CBAM
    assert cbam_ext.convert(model, inplace=True) is model
    assert type(model[1]) is cbam_ext.CBAM


def test_a_shared_module_stays_shared() -> None:
    shared = timm_cbam(24)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    found, report = cbam_ext.convert(model, return_report=True)
    assert found[0] is found[2][0]
    assert type(found[0]) is cbam_ext.CBAM
    assert [done.name for done in report.converted] == ["0"]


@pytest.mark.parametrize("arch", ["resnet18", "skresnet18"])
def test_timm_models(arch: str, generator: torch.Generator) -> None:
    # Blocks that begin as zero would hide what their attention does.
    options = {"block_args": {"attn_layer": "cbam"}, "zero_init_last": False, "num_classes": 5}
    theirs = timm.create_model(arch, **options)
    expected = sum(type(m).__name__ == "CbamModule" for m in theirs.modules())
    image = torch.randn(2, 3, 64, 64, generator=generator)
    ours, report = cbam_ext.convert(theirs, example_inputs=image, return_report=True)
    assert len(report.converted) == expected > 0
    assert report.left == []
    with torch.no_grad():
        truth = theirs.eval()(image)
        torch.testing.assert_close(ours.eval()(image), truth, rtol=1e-4, atol=1e-4)
        for module in ours.modules():
            if isinstance(module, cbam_ext.CBAM):
                module.channel.fc2.weight.add_(1)
        assert not torch.allclose(ours(image), truth, rtol=1e-2)  # attention counts
    ours.train()(image).square().mean().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_timm_encoder_in_smp(generator: torch.Generator) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    options = {"block_args": {"attn_layer": "cbam"}, "zero_init_last": False}
    theirs = smp.Unet("tu-resnet18", encoder_weights=None, **options)
    ours, report = cbam_ext.convert(theirs, return_report=True)
    assert len(report.converted) == 8
    assert report.converted[0].name == "encoder.model.layer1.0.se"
    image = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        truth = theirs.eval()(image)
        torch.testing.assert_close(ours.eval()(image), truth, rtol=1e-4, atol=1e-4)


def test_report_shows_what_happened() -> None:
    model = nn.Sequential(peers.PeachyCBAM(32), peers.UltralyticsCBAM(32))
    _, report = cbam_ext.convert(model, return_report=True)
    first, second, third = str(report).split("\n")
    assert first == "converted 1, left 1"
    assert second.startswith("  0: was PeachyCBAM, outputs differ by ")
    assert second.endswith("; adds its input, so it became Residual(CBAM)")
    assert third.startswith("  1: UltralyticsCBAM left alone: its MLP is a single")


def test_example_inputs_catch_a_changed_model(generator: torch.Generator) -> None:
    class Peculiar(nn.Module):
        """Does something else where somebody changed it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.cbam = nn.Conv2d(24, 24, 1), timm_cbam(24)

        def forward(self, x: Tensor) -> Tensor:
            factor = 1 if type(self.cbam).__name__ == "CbamModule" else 2
            return factor * self.cbam(self.conv(x))

    x = torch.randn(2, 24, 8, 8, generator=generator)
    assert type(cbam_ext.convert(Peculiar()).cbam) is cbam_ext.CBAM
    with pytest.raises(RuntimeError, match="output of the model on example_inputs changed by"):
        cbam_ext.convert(Peculiar(), example_inputs=x)
