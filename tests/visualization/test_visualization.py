"""Gates of a whole model: right, without a trace in the model, and drawn as documented."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import cbam_ext.smp
from cbam_ext import reference
from cbam_ext.visualization import Gates, visualize

from support.looks import images, plain
from support.samples import LIMITS, same_bits


class Noisy(nn.Module):
    """Random in eval mode too, and in training mode with statistics to be spoilt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.first = cbam_ext.CBAM(16, mlp_bias=True, norm_layer=nn.BatchNorm2d)
        self.pool = nn.MaxPool2d(2)
        self.second = cbam_ext.CBAM(16, kernel_size=3, conv_bias=True)
        self.unused = cbam_ext.CBAM(16)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0.2, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 2.0)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(self.norm(self.stem(images)))
        return self.second(nn.functional.dropout(self.pool(x), 1e-30, training=True))


def true_gates(module: cbam_ext.CBAM, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Channel gate, spatial gate and output in float64, by the reference and the norm's formula."""
    fc1, fc2, conv = module.channel.fc1, module.channel.fc2, module.spatial.conv
    parameters = [
        None if t is None else t.detach().double()
        for t in (fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias)
    ]
    channel = reference.channel_gate(x, *parameters[:4])
    logits = reference.spatial_logits(x, channel, *parameters[4:])
    norm = module.spatial.norm
    if norm is not None:
        logits = (logits - norm.running_mean) / (norm.running_var.double() + norm.eps).sqrt()
        logits = logits * norm.weight.double() + norm.bias.double()
    spatial = torch.sigmoid(logits).detach()
    return channel, spatial, channel * spatial * x


def assert_gates(
    gates: Gates, channel: Tensor, spatial: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    for gate, expected in zip(gates, (channel, spatial), strict=True):
        assert gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gate.device.type == "cpu" and not gate.requires_grad
        assert gate.shape == expected.shape
        limit = LIMITS[dtype] * expected.abs().max()
        assert (gate.double() - expected).abs().max() <= limit


# ------------------------------------------------------------------------------------ collecting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_are_those_of_the_reference(dtype):
    model, x = Noisy().to(dtype).train(), images().to(dtype)
    maps = visualize(model, x)
    assert list(maps) == ["first", "second"]  # the unused one never ran

    with torch.no_grad():
        exact = copy.deepcopy(model).double().eval()
        features = exact.norm(exact.stem(x.double()))
        channel, spatial, features = true_gates(exact.first, features)
        assert_gates(maps["first"], channel, spatial, dtype)
        channel, spatial, _ = true_gates(exact.second, exact.pool(features))
        assert_gates(maps["second"], channel, spatial, dtype)
    assert maps["first"].spatial_gate.shape == (2, 1, 12, 16)
    assert maps["second"].spatial_gate.shape == (2, 1, 6, 8)


def test_the_model_may_be_a_cbam():
    module, x = cbam_ext.CBAM(8), images(channels=8)
    maps = visualize(module, x)
    assert list(maps) == ["CBAM"]
    assert_gates(maps["CBAM"], *true_gates(module, x.double())[:2])


def snapshot(model: nn.Module) -> list[object]:
    modules = list(model.modules())
    return [
        {name: t.clone() for name, t in model.state_dict().items()},
        [m.training for m in modules],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules],
        [len(m._forward_pre_hooks_with_kwargs) for m in modules],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    ]


def assert_same(before: object, after: object) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        before, after = list(before.values()), list(after.values())
    if isinstance(before, list):
        for a, b in zip(before, after, strict=True):
            assert_same(a, b)
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


@pytest.mark.parametrize("fails", [False, True], ids=["", "with an error in forward"])
def test_nothing_is_left_in_the_model(fails):
    model = Noisy().train()
    model.norm.eval()  # frozen, in a model that trains
    model(images()).sum().backward()
    model.second.register_forward_pre_hook(lambda module, args: None)
    before = snapshot(model)
    if fails:
        model.pool.forward = lambda x: x.no_such_thing
        with pytest.raises(AttributeError, match="no_such_thing"):
            visualize(model, images_for(before))
        del model.pool.forward
    else:
        visualize(model, images_for(before))
    assert_same(before, snapshot(model))


def images_for(before: list[object]) -> Tensor:
    """Images that take no random numbers after the snapshot."""
    x = images()
    torch.set_rng_state(before[6])
    return x


def test_overridden_train_is_not_called():
    """Some modules do more there, such as merging weights."""

    class Merging(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("train() was called")

    maps = visualize(nn.Sequential(Merging(cbam_ext.CBAM(3))), images())
    assert list(maps) == ["0.0"]


def test_every_call_and_one_name_for_a_shared_module():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = cbam_ext.CBAM(3)
            self.a = cbam_ext.CBAM(3)
            self.again = self.b

        def forward(self, x: Tensor) -> Tensor:
            return self.again(input=self.b(self.a(x)))

    model, x = Twice(), images()
    maps = visualize(model, x)
    assert list(maps) == ["a", "b", "b#2"]
    for name in maps:
        channel, spatial, output = true_gates(getattr(model, name[0]), x.double())
        assert_gates(maps[name], channel, spatial)
        x = output


def test_smp_models_in_the_order_of_execution():
    cbam_ext.smp.register()
    try:
        model = smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="cbam")
    finally:
        cbam_ext.smp.unregister()
    maps = visualize(model, images(1, height=64, width=64))
    expected = [f"decoder.blocks.{i}.attention{j}.attention" for i in range(5) for j in (1, 2)]
    expected.remove("decoder.blocks.4.attention1.attention")  # smp never runs it
    assert list(maps) == expected
    assert [m.spatial_gate.shape[2] for m in maps.values()] == [4, 4, 8, 8, 16, 16, 32, 32, 64]


# ------------------------------------------------------------------------------ kinds of models


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def inner(model: nn.Module) -> nn.Module:
    model[1].compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "Module.compile": in_place,
    "compiled CBAM": inner,
    "DataParallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_and_compiled_models(wrap):
    model, x = plain(), images()
    expected = visualize(model, x)
    wrapped = wrap(model)
    with torch.no_grad():
        wrapped(x)  # compiled before it is looked at
    maps = visualize(wrapped, x)
    assert list(maps) == ["1"]
    assert all(map(same_bits, maps["1"], expected["1"]))
    assert not model[1]._forward_pre_hooks


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = plain()
        parallel = nn.parallel.DistributedDataParallel(model)
        assert list(visualize(parallel, images())) == ["1"]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_take_float_images(dtype):
    model, x = plain().to(dtype), images()
    maps = visualize(model, x)
    with torch.no_grad():
        features = model[0](x.to(dtype))
    # The gates are float32 throughout, so only the input of the CBAM is rounded.
    exact = true_gates(model[1], features.double())
    assert_gates(maps["1"], *exact[:2])


def test_autocast_stays_on():
    model, x = plain(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = visualize(model, x)
        features = model[0](x).detach()
    assert features.dtype == torch.bfloat16
    assert_gates(maps["1"], *true_gates(model[1], features.double())[:2])


def test_inference_mode():
    with torch.inference_mode():
        maps = visualize(plain(), images())
    assert maps.overlays() is not None


def test_a_tuple_holds_all_arguments():
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cbam = cbam_ext.CBAM(3, dtype=torch.float64)

        def forward(self, x: Tensor, index: Tensor, factor: float) -> Tensor:
            assert index.dtype == torch.int64
            return self.cbam(x * factor)

    model, x = Conditioned(), images()
    maps = visualize(model, (x, torch.arange(2), 3.0))
    assert_gates(maps["cbam"], *true_gates(model.cbam, 3 * x.double())[:2], torch.float64)
    assert maps.overlays().axes[0].get_title() == "image"


def test_scripted_cbams_beside_others_are_told():
    module = cbam_ext.CBAM(3)
    scripted = torch.jit.script(copy.deepcopy(module))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), module, nn.Sequential(scripted))
    with pytest.warns(UserWarning, match=r"visualize leaves out 2\.0: what is scripted") as caught:
        maps = visualize(model, images())
    assert list(maps) == ["1"]
    told = [each for each in caught if "visualize" in str(each.message)]
    assert len(told) == 1 and told[0].filename == __file__


def test_a_forward_that_works_in_place():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.sub_(0.5).div_(0.2))

    x = images().clamp(0, 1)
    given = x.clone()
    maps = visualize(InPlace(), x)
    assert torch.equal(x, given) and torch.equal(torch.stack(list(maps._images)), given)


def test_names_with_brackets_and_images_of_integers():
    model = nn.ModuleDict({"a[b]": plain()})["a[b]"]
    holder = nn.Sequential()
    holder.add_module("a[b]", model)
    (name,) = visualize(holder, images())
    assert list(visualize(holder, images(), modules=name)) == [name]
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="images are torch.uint8"):
        visualize(holder, pixels, mean=0.5, std=0.2)


def test_modules_by_name_and_pattern():
    model = nn.Sequential(*(cbam_ext.CBAM(3) for _ in range(3)), nn.Sequential(cbam_ext.CBAM(3)))
    x = images()
    assert list(visualize(model, x, modules="1")) == ["1"]
    assert list(visualize(model, x, modules=["3.*", "0"])) == ["0", "3.0"]
    assert list(visualize(model, x, modules=(n for n in ("[12]",)))) == ["1", "2"]


# ---------------------------------------------------------------------------------------- errors


class NotOursCbam(nn.Module):
    pass


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("model", 0), {}, TypeError, "model must be a torch.nn.Module, got str"),
        ((plain(), [1]), {}, TypeError, "images must be a tensor.*got int"),
        ((plain(), ()), {}, TypeError, "images must be a tensor.*got no arguments"),
        ((plain(), []), {}, ValueError, "images must not be empty, got an empty list"),
        ((plain(), images()[0]), {}, ValueError, r"images must be .*got \[3, 12, 16\].*\[None\]"),
        ((plain(), images(0)), {}, ValueError, r"not empty, got \[0, 3, 12, 16\]$"),
        ((nn.ReLU(), images()), {}, ValueError, r"model \(ReLU\) has no cbam_ext.CBAM; there is"),
        (
            (nn.Sequential(nn.ReLU(), NotOursCbam()), images()),
            {},
            ValueError,
            r"model\.1 is a \S*NotOursCbam.*cbam_ext\.convert\(model\)",
        ),
        ((NotOursCbam(), images()), {}, ValueError, "but model is a .*NotOursCbam"),
        ((plain(), images()), {"modules": "2"}, ValueError, "modules: .* '2', only 1$"),
        ((plain(), images()), {"modules": []}, ValueError, "modules must hold at least one"),
        ((plain(), images()), {"modules": [1]}, TypeError, "modules must be names.*got int"),
        ((plain(), images()), {"mean": 0.5}, ValueError, "mean and std go together, std is miss"),
        ((plain(), images()), {"std": 0.5}, ValueError, "mean is missing"),
        (
            (plain(), images()),
            {"mean": 0, "std": [1, 2]},
            ValueError,
            r"std must be a number or one for each of the 3 channels of images, got shape \[2\]",
        ),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        visualize(*arguments, **options)


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
@pytest.mark.parametrize("how", ["script", "trace", "inside"])
def test_scripted_models_are_refused(how):
    model = torch.jit.trace(plain(), images()) if how == "trace" else torch.jit.script(plain())
    with pytest.raises(TypeError, match="scripted or traced; pass the model that it was made"):
        visualize(nn.Sequential(model) if how == "inside" else model, images())


def test_a_forward_that_calls_none():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cbam = cbam_ext.CBAM(3)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="forward of Unused called none of these CBAMs: cbam$"):
        visualize(Unused(), images())
