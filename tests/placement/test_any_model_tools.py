"""Models with CBAMs by add_cbam: copied, compiled, exported, scripted, and modules replaced."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import cbam_ext
from cbam_ext import add_cbam, remove_cbam
from cbam_ext.placement import hooks

from support.placements import cbams, image, make_gates_tell

OPERATOR = torch.ops.cbam.forward.default


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.bn(self.conv(x)))


class Scaled(Block):
    """Whose branch ends in no module but what drops it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(0.5 * self.bn(self.conv(x)))


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sequential(Block(), Scaled()), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


PLACES = ["residual", "0"]


def placed() -> nn.Sequential:
    model = small().eval()
    add_cbam(model, PLACES)
    assert list(cbams(model)) == ["0.cbam", "1.0.bn.cbam", "1.1.drop_path.cbam"]
    make_gates_tell(model)
    return model


def test_copies() -> None:
    model, x = placed(), image()
    expected = model(x)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate(x), expected)
        with torch.no_grad():  # on its own
            duplicate[0].cbam.spatial.conv.weight.add_(1)
        assert not torch.equal(duplicate(x), expected)
        assert not cbams(remove_cbam(duplicate))
    assert torch.equal(model(x), expected)


def test_hooks_of_a_loading_process_do_not_take_the_place_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hooks are numbered from 0 in each process, and two with one number replace each other."""
    monkeypatch.setattr(RemovableHandle, "next_id", 3)
    model, x = placed(), image()
    expected, saved = model(x), pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    loaded = pickle.loads(saved)
    for name in cbams(loaded):
        host = loaded.get_submodule(name.removesuffix(".cbam"))
        for _ in range(10):
            host.register_forward_hook(lambda *_: None)
            host.register_forward_pre_hook(lambda *_: None)
    assert torch.equal(loaded(x), expected)


@pytest.mark.slow
def test_compiled_code_of_before_is_forgotten() -> None:
    model, x = small().eval(), image()
    model.compile(backend="eager")
    with torch.no_grad():
        before = model(x)
        add_cbam(model, PLACES)
        make_gates_tell(model)
        changed = model(x)
        torch.testing.assert_close(changed, model.forward(x))
        remove_cbam(model)
        torch.testing.assert_close(model(x), model.forward(x))
    assert not torch.allclose(changed, before, rtol=1e-3)


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    model, x = placed().train(), image()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    upstream = torch.randn(2, 8)
    results = []
    for each in (model, compiled):
        each.zero_grad()
        output = each(x)
        output.backward(upstream)
        results.append([output.detach(), *(p.grad for p in each.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_export(layout: str) -> None:
    model = placed()
    if layout == "nhwc":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), Permute(), nn.LayerNorm(8)).eval()
        add_cbam(model, "2", layout="nhwc")
    x = image()
    exported = torch.export.export(model, (x,))
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(OPERATOR) == len(cbams(model))
    torch.testing.assert_close(exported.module()(x), model(x))


class Permute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_torchscript(layout: str, tmp_path: Any) -> None:
    model = placed()
    if layout == "nhwc":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), Permute(), nn.LayerNorm(8)).eval()
        add_cbam(model, "2", layout="nhwc")
    x = image()
    torch.jit.script(model).save(tmp_path / "model.ts")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(x), model(x))


def test_fx() -> None:
    model, x = placed(), image()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    nodes = {"1.0": "block"}
    extractor = torchvision.models.feature_extraction.create_feature_extractor(model, nodes)
    assert list(extractor(x)) == ["block"]


def test_what_looks_at_models() -> None:
    model, x = placed(), image()
    maps = cbam_ext.visualize(model, x)
    assert list(maps) == list(cbams(model))
    with_cbams = cbam_ext.measure_cost(model, x, rounds=1)
    plain = cbam_ext.measure_cost(small(), x, rounds=1)
    added = sum(p.numel() for cbam in cbams(model).values() for p in cbam.parameters())
    assert with_cbams.parameters == plain.parameters + added
    converted = cbam_ext.to_plain(model)
    assert not cbams(converted) and converted.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(converted(x), model(x))
    back = cbam_ext.convert(converted)
    assert list(cbams(back)) == list(cbams(model))
    remove_cbam(converted)
    assert converted.state_dict().keys() == small().state_dict().keys()


# ------------------------------------------------------------------- other modules in their places


@pytest.mark.parametrize("how", ["torch", "timm", "pickled"])
def test_synchronised_norms(how: str) -> None:
    """The tools that put SyncBatchNorm for BatchNorm copy children, but no hooks."""
    model, x = placed(), image()
    expected = model(x)
    if how == "pickled":
        saved = pickle.dumps(model)
        assert hooks._lookout is not None
        hooks._lookout.remove()  # as in a process that has placed none
        hooks._lookout = None
        model = pickle.loads(saved)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    converted = timm.layers.convert_sync_batchnorm(model) if how == "timm" else convert(model)
    norm = converted[1][0].bn
    assert isinstance(norm, nn.SyncBatchNorm) and isinstance(norm.cbam, cbam_ext.CBAM)
    torch.testing.assert_close(converted(x), expected)
    assert not cbams(remove_cbam(converted))


def test_frozen_norms() -> None:
    model, x = placed(), image()
    expected = model(x)
    frozen = timm.layers.freeze_batch_norm_2d(model)
    assert not isinstance(frozen[1][0].bn, nn.BatchNorm2d)
    torch.testing.assert_close(frozen(x), expected)


class Adapter(nn.Module):
    """As of LoRA."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.more = base, nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)


def test_a_successor_takes_over() -> None:
    """As where the forward of the model called the CBAM."""
    model, x = placed(), image()
    cbam, old = model[0].cbam, model[0]
    model[0] = Adapter(old)
    assert model[0].cbam is cbam and not hasattr(old, "cbam")
    expected = nn.Sequential(*model[1:])(cbam(old(x) + model[0].more(x)))
    torch.testing.assert_close(model(x), expected)
    block = model[1][1]
    block.drop_path = nn.Dropout(0.5).eval()  # the CBAM stays before it
    assert list(cbams(model)) == ["0.cbam", "1.0.bn.cbam", "1.1.drop_path.cbam"]
    torch.testing.assert_close(model(x), expected)
    remove_cbam(model)
    assert not cbams(model) and not hasattr(model[0], "cbam")


class HasOne(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.cbam = nn.Identity()


def test_a_successor_of_a_plain_one() -> None:
    model, x = cbam_ext.to_plain(placed()), image()
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(converted(x), expected)


def test_a_successor_that_runs_its_children() -> None:
    model, x = placed(), image()
    expected = model(x)
    block = model[1][0]
    block.bn = nn.Sequential(block.bn, nn.Identity())  # the old one is called as before
    torch.testing.assert_close(model(x), expected)
    assert "1.0.bn.0.cbam" in cbams(model)
    with pytest.raises(RuntimeError, match=r"'0' has a CBAM .* Sequential; call cbam_ext.remove"):
        model[0] = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(RuntimeError, match="'0' has a CBAM .* cannot go over to a HasOne"):
        model[0] = HasOne()
    torch.testing.assert_close(model(x), expected)


def test_the_same_module_again() -> None:
    model, x = placed(), image()
    expected, before = model(x), list(cbams(model))
    block = model[1][0]
    block.bn = block.bn
    nn.Sequential(*block.children())
    assert list(cbams(model)) == before
    torch.testing.assert_close(model(x), expected)
