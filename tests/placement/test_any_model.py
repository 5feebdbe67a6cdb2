"""add_cbam in any model: which modules are meant, where the CBAM goes, and what stays."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbam_ext
from cbam_ext import add_cbam, remove_cbam

from support.placements import ResidualBlock, add, cbams, image, make_gates_tell


class Stage(nn.Module):
    """Runs its children, as timm's RegStage."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        for number, block in enumerate(blocks):
            self.add_module(f"b{number}", block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.stage1 = nn.Sequential(ResidualBlock(8), ResidualBlock(8))
        self.stage2 = Stage(ResidualBlock(8, 2), ResidualBlock(16))
        self.unused = nn.Conv2d(8, 8, 1)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stage2(self.stage1(self.stem(x)))))


# ------------------------------------------------------------------------------ what is meant


def _id(value: object) -> str:
    return "function" if isinstance(value, FunctionType) else str(value)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("stem", ["stem.1"]),
        ("stem.0", ["stem.0"]),
        ("stage1", ["stage1.1"]),
        ("stage2", ["stage2.b1"]),
        ("stage?", ["stage1.1", "stage2.b1"]),
        ("stage[13]", ["stage1.1"]),
        ("s*.1", ["stem.1", "stage1.1"]),
        ("*.b*", ["stage2.b0", "stage2.b1"]),
        ("stage*.*.bn2", ["stage1.0.bn2", "stage1.1.bn2", "stage2.b0.bn2", "stage2.b1.bn2"]),
        (["stage2", "stem"], ["stem.1", "stage2.b1"]),
        (["stage1", "stage1.1"], ["stage1.1"]),
        (("stage1", "stage*"), ["stage1.1", "stage2.b1"]),
        ("residual", ["stage1.0.bn2", "stage1.1.bn2", "stage2.b0.bn2", "stage2.b1.bn2"]),
        (lambda name, module: isinstance(module, ResidualBlock) and module.conv1.stride == (2, 2),
         ["stage2.b0"]),
    ],
    ids=_id,
)  # fmt: skip
def test_after(after: Any, expected: list[str]) -> None:
    model = Net()
    assert add(model, after) == expected
    found = [(name, module.in_channels) for name, module in cbams(model).items()]
    calls = []
    for name, module in cbams(model).items():
        module.register_forward_hook(lambda m, args, output, name=name: calls.append(name))
    model(image())
    assert calls == [name for name, _ in found]  # each once
    assert len(model.stem) == len(model.stage1) == 2 and len([*model.stage2.children()]) == 2


def test_it_stands_behind_what_was_named() -> None:
    """Behind the ReLU that works in place, not behind the convolution into whose output it does."""
    model = Net().double().eval()
    add_cbam(model, ["stem", "stage2"])
    make_gates_tell(model)
    plain = remove_cbam(copy.deepcopy(model))
    x = image().double()
    stem = model.stem[1].cbam(plain.stem(x))
    expected = plain.head(plain.pool(model.stage2.b1.cbam(plain.stage2(plain.stage1(stem)))))
    torch.testing.assert_close(model(x), expected)


class Indexed(nn.ModuleList):
    """Counts its children."""

    def forward(self, x: Tensor) -> Tensor:
        return self[-1](self[0](x))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_where_several_return_the_same_map() -> None:
    """The outermost and last that does not run or count its children."""

    def pair() -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(3, 4, 1), Around(nn.Conv2d(4, 4, 1))

    assert add(nn.Sequential(Indexed(pair())), "0") == ["0.1"]
    assert add(nn.Sequential(Around(Indexed(pair()))), "0") == ["0"]
    assert add(nn.Sequential(nn.Sequential(*pair())), "0") == ["0.1"]
    assert add(nn.Sequential(nn.Sequential(*pair(), nn.Dropout())), "0") == ["0.2"]
    model = nn.Sequential(Around(Around(nn.Conv2d(3, 4, 1))))
    assert add(model, ["0", "*.inner", "*.*.inner"]) == ["0"]  # one map, one CBAM


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("stage3", "Net has no module 'stage3'; near to that are .*'stage2'"),
        (["stem", "x.y.z"], "no module 'x.y.z'; its children are 'stem', 'stage1'"),
        ("*.*.*.*", "no module"),
        (lambda name, module: False, "chose none of the"),
        ([], "it is empty"),
        ("unused", "'unused' is not run"),
        ("stage1.0.relu", "'stage1.0.relu' is run 2 times"),
        (
            "head",
            r"'head' returns a tensor \[2, 5\] of torch.float32, and not a feature map \[N, C",
        ),
        ("", r"the model itself returns a tensor \[2, 5\]"),
    ],
    ids=_id,
)
def test_what_cannot_be_changes_nothing(after: Any, message: str) -> None:
    model = Net()
    before = str(model), pickle.dumps(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_cbam(model, after)
    assert (str(model), pickle.dumps(model.state_dict())) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Shared(nn.Module):
    """One module by two names, and a dict for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = self.first
        self.cbam = None
        self.last = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.last(self.second(self.first(x)))}


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("second", "'first' is run 2 times"),
        ("", "the model itself returns a dict, and not a feature map"),
        ("residual", "no block of feature maps adds its input"),
    ],
    ids=_id,
)
def test_shared_modules_and_other_results(after: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_cbam(Shared(), after)
    assert add(Shared(), "last") == ["last"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_wrong_arguments() -> None:
    model = Net()
    for after in (None, 3, model.stem, ["stem", 3]):
        with pytest.raises(TypeError, match="after must be the name of a module"):
            add_cbam(model, after)
    for thing in (
        None, "stem", nn.DataParallel(Net()), torch.compile(Net(), backend="eager"),
        torch.jit.trace(nn.Conv2d(3, 3, 1), image()),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"add_cbam: model .*"):
            add_cbam(thing, "stem")
    for options, message in (
        ({"layout": "nwhc"}, "layout must be 'nchw' or 'nhwc'"),
        ({"init": "zero"}, "init must be"),
        ({"kernel": 3}, "unknown option 'kernel'"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
    ):
        with pytest.raises(ValueError, match=message):
            add_cbam(model, "stem", **options)
    with pytest.raises(TypeError, match="Net cannot be called with these inputs"):
        add_cbam(model, "stem", example_inputs=(image(), image()))
    with pytest.raises(TypeError, match=r"no convolution .* give example_inputs"):
        add_cbam(nn.Sequential(nn.ReLU()), "0")
    with pytest.raises(TypeError, match="does not run on two images of 224 x 224 with 3"):
        add_cbam(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(9, 9)), "0")
    with pytest.raises(ValueError, match="0.weight has no shape yet; run the model once before"):
        add_cbam(nn.Sequential(nn.LazyConv2d(4, 1)), "0")
    with pytest.raises(ValueError, match="'0' has a 'cbam' of its own"):
        add_cbam(nn.Sequential(HasOne()), "0")
    assert not cbams(model)


class HasOne(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 3, 1)
        self.cbam = nn.Identity()


def test_a_second_call_and_removing() -> None:
    model = Net()
    before = str(model)
    state = model.state_dict(keep_vars=True)
    with pytest.raises(ValueError, match="remove_cbam: Net has no CBAMs by add_cbam"):
        remove_cbam(model)
    add_cbam(model, "stage*", norm_layer="batchnorm")
    with pytest.raises(ValueError, match=r"name all places in one call.*cbam_ext.remove_cbam"):
        add_cbam(model, "stem")
    duplicate = copy.deepcopy(model)
    assert remove_cbam(model) is model
    assert str(model) == before and not cbams(model)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == state.keys() and all(after[k] is state[k] for k in state)
    assert not any(m._forward_hooks for m in model.modules())
    model(image())
    assert len(cbams(duplicate)) == 2 and add(model, "stem") == ["stem.1"]
    assert str(remove_cbam(duplicate)) == before  # the hooks of the copy are its own
    with pytest.raises(TypeError, match="got str"):
        remove_cbam("model")


# ------------------------------------------------------------------------------ layouts


class ChannelsLast(nn.Module):
    """As between the blocks of a Swin transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mlp = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("size", [(20, 20), (20, 32)])
def test_channels_last(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    model = ChannelsLast().double()
    for after in ("mlp", "residual"):
        with pytest.raises(
            ValueError, match=r"'mlp' returns \[2, .*like \[N, H, W, C\]; pass layou"
        ):
            add_cbam(model, after, example_inputs=x)
    with pytest.raises(
        ValueError, match=r"'stem' returns .*like \[N, C, H, W\]; pass layout='nchw'"
    ):
        add_cbam(model, "stem", example_inputs=x, layout="nhwc")
    add_cbam(model, "residual", example_inputs=x, layout="nhwc")
    make_gates_tell(model)
    plain = remove_cbam(copy.deepcopy(model))
    y = plain.stem(x).permute(0, 2, 3, 1)
    branch = model.mlp.cbam(plain.mlp(plain.norm(y)).permute(0, 3, 1, 2))
    torch.testing.assert_close(model(x), y + branch.permute(0, 2, 3, 1))


# ------------------------------------------------------------------------------ the survey


class Careless(Net):
    """Writes into itself in forward, draws, and looks at numbers."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.looks, self.grid, self.sizes = looks, None, {}
        self.dropout = nn.Dropout()

    def forward(self, image: Tensor, *, scale: Tensor) -> Any:
        if self.looks and image.sum() > 1e6:
            raise AssertionError
        self.seen += 1
        self.grid = torch.rand(3) * scale
        self.sizes[image.shape] = self.grid
        return OrderedDict(out=super().forward(image * scale))


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_was(looks: bool, training: bool) -> None:
    model = Careless(looks).train(training)
    model.stage1.eval()
    seen: list[float] = []
    model.stem.register_forward_hook(lambda *a: seen.append(a[2].mean().item()))
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    inputs = {"image": image(), "scale": torch.ones(1)}
    state = torch.get_rng_state()
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    add_cbam(model, "stage*", example_inputs=inputs)
    assert not seen and model.grid is None and not model.sizes
    assert modes.items() <= {n: m.training for n, m in model.named_modules()}.items()
    for name, module in cbams(model).items():
        assert {m.training for m in module.modules()} == {modes[name.removesuffix(".cbam")]}
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(inputs[name], tensor) for name, tensor in kept.items())
    # Nothing random was drawn but the weights of the CBAMs.
    torch.set_rng_state(state)
    for cbam in cbams(model).values():
        again = cbam_ext.CBAM(cbam.in_channels)
        assert torch.equal(again.spatial.conv.weight, cbam.spatial.conv.weight)
    model(**inputs)
    assert len(seen) == 1


def test_no_numbers_are_computed_where_none_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = Net().bfloat16()
    add_cbam(model, "residual", init="identity")
    assert len(cbams(model)) == 4 and all(p.is_meta for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Casts(nn.Module):
    """Weights of float32, maps of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x).bfloat16())


def test_dtypes() -> None:
    model = Casts()
    add_cbam(model, "act")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(image()).dtype == torch.bfloat16
    for mode in (torch.no_grad, torch.inference_mode):
        model = Net().half()
        with mode():
            add_cbam(model, "stage1")
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert not any(p.is_inference() for p in model.parameters())


def test_init_and_options() -> None:
    model, x = Net().eval(), image()
    before = model(x)
    add_cbam(model, "residual", init="identity", reduction=2, kernel_size=3, norm_layer="batchnorm")
    for cbam in cbams(model).values():
        wanted = cbam_ext.CBAM(
            cbam.in_channels, 2, 3, mlp_bias=True, norm_layer=nn.BatchNorm2d
        ).eval()
        assert str(cbam) == str(wanted)
        for gate in cbam.attention(torch.rand(1, cbam.in_channels, 4, 4)):
            torch.testing.assert_close(gate, torch.tensor(5.0).sigmoid().expand_as(gate))
    change = (model(x) - before).norm() / before.norm()
    assert 0 < change < 0.1
    remove_cbam(model)
    assert torch.equal(model(x), before)


def test_states(tmp_path: Path) -> None:
    model, other, x = Net().eval(), Net().eval(), image()
    plain = copy.deepcopy(model)
    add_cbam(model, "residual")
    add_cbam(other, "residual")
    torch.save(model.state_dict(), tmp_path / "state.pth")
    other.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert torch.equal(other(x), model(x))
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".cbam." in key for key in missing)
