"""add_cbam: CBAM at encoder stages, skips and decoder outputs of every architecture of smp."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import cbam_ext.conversion
import cbam_ext.smp
from cbam_ext.smp import add_cbam


@dataclass(frozen=True)
class Case:
    """A slim model, and the stages that its decoder reads, from smp's code."""

    architecture: str
    stages: list[int]
    encoder: str = "resnet18"
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 64  # of images; PAN needs a deepest map of 8 x 8

    def __str__(self) -> str:
        return "-".join([self.architecture, self.encoder, *map(str, self.options.values())])


SLIM: dict[str, dict[str, Any]] = {
    "Unet": {"decoder_channels": (32, 16, 16, 16, 16)},
    "UnetPlusPlus": {"decoder_channels": (32, 16, 16, 16, 16)},
    "MAnet": {"decoder_channels": (32, 16, 16, 16, 16), "decoder_pab_channels": 8},
    "Linknet": {},
    "FPN": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "PSPNet": {"psp_out_channels": 32},
    "DeepLabV3": {"decoder_channels": 16},
    "DeepLabV3Plus": {"decoder_channels": 16},
    "PAN": {},
    "UPerNet": {"decoder_channels": 16},
    "Segformer": {"decoder_segmentation_channels": 16},
    "DPT": {"decoder_intermediate_channels": (16, 16, 16, 16), "decoder_fusion_channels": 16},
}
# Compiling takes most of the time of the tests that do it.
SMALL_UNET = Case("Unet", [1], options={"encoder_depth": 1, "decoder_channels": (16,)})
VIT = "tu-vit_tiny_patch16_224"
ONE_OF_EACH = [
    Case("Unet", [1, 2, 3, 4, 5]),
    Case("UnetPlusPlus", [1, 2, 3, 4, 5]),
    Case("MAnet", [1, 2, 3, 4, 5]),
    Case("Linknet", [1, 2, 3, 4, 5]),
    Case("FPN", [2, 3, 4, 5]),
    Case("PSPNet", [3]),
    Case("DeepLabV3", [5]),
    Case("DeepLabV3Plus", [2, 5]),
    Case("PAN", [2, 3, 4, 5], size=128),
    Case("UPerNet", [2, 3, 4, 5]),
    Case("Segformer", [1, 2, 3, 4, 5]),
    Case("DPT", [0, 1, 2, 3], VIT, size=224),
]
MORE = [
    Case("Unet", [1, 2, 3], options={"encoder_depth": 3, "decoder_channels": (16, 8, 8)}),
    Case("FPN", [1, 2, 3, 4], options={"encoder_depth": 4}),
    Case("FPN", [1, 2, 3], options={"encoder_depth": 3}),  # its fourth map is the image
    Case("FPN", [0, 1, 2, 3], "vgg11_bn", {"encoder_depth": 3}, 32),  # there not
    Case("Unet", [2, 3, 4, 5], "mit_b0", size=32),  # has a stage of 0 channels
    Case("DeepLabV3Plus", [2, 4], "tu-resnet18", {"encoder_depth": 4, "encoder_output_stride": 8}),
    Case("PSPNet", [4], "tu-resnet18", {"encoder_depth": 4}),
    Case("Unet", [1, 2, 3, 4, 5], options={"decoder_attention_type": "scse"}),
    Case("DPT", [0], VIT, {"encoder_depth": 1, "decoder_readout": "ignore"}, 224),
]


def build(case: Case | str, **options: Any) -> nn.Module:
    case = Case(case, []) if isinstance(case, str) else case
    merged = {**SLIM[case.architecture], **case.options, **options}
    if case.architecture == "DPT":
        merged["decoder_intermediate_channels"] = (16,) * merged.get("encoder_depth", 4)
    return getattr(smp, case.architecture)(case.encoder, encoder_weights=None, **merged).eval()


def cbams(model: nn.Module) -> dict[str, cbam_ext.CBAM]:
    return {n: m for n, m in model.named_modules() if isinstance(m, cbam_ext.CBAM)}


def stages_of(model: nn.Module) -> list[int]:
    return [int(name.rsplit(".", 1)[1]) for name in cbams(model) if "cbam_features" in name]


def image(size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def reference(cbam: cbam_ext.CBAM, x: Tensor) -> Tensor:
    return cbam_ext.reference.cbam(x, *cbam._read_layers())


def reference_output(model: nn.Module, x: Tensor) -> Tensor:
    """The model by hand: ``forward`` calls no hooks."""
    features, tokens = model.encoder(x), []
    if isinstance(features, tuple):
        features, *tokens = features
    held = cbams(model)
    refined = [
        reference(held[name], feature)
        if (name := f"decoder.cbam_features.{stage}") in held
        else feature
        for stage, feature in enumerate(features)
    ]
    output = model.decoder.forward(refined, *tokens)
    if "decoder.cbam_output" in held:
        output = reference(held["decoder.cbam_output"], output)
    return model.segmentation_head(output)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def gradients(model: nn.Module, x: Tensor, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Of the parameters that have one."""
    model.zero_grad()
    output = model(x)
    output.backward(torch.randn_like(output) if upstream is None else upstream)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------ places


@pytest.mark.one_quick
@pytest.mark.parametrize("case", ONE_OF_EACH + MORE, ids=str)
def test_every_place_computes_learns_and_leaves_the_model_as_it_was(case):
    model = build(case).double()
    x = image(case.size).double()
    plain = model(x)
    before = model.state_dict(keep_vars=True)
    with_gradient = set(gradients(model, x))
    random_state = torch.get_rng_state()
    modes = {name: module.training for name, module in model.named_modules()}

    opened = add_cbam(copy.deepcopy(model), ["encoder", "decoder"], init="identity")
    torch.set_rng_state(random_state)
    assert add_cbam(model, ["encoder", "decoder"]) is model
    assert stages_of(model) == case.stages and "decoder.cbam_output" in cbams(model)
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is tensor for key, tensor in before.items())
    assert all(key.startswith("decoder.cbam_") for key in after.keys() - before.keys())
    assert modes.items() <= {n: m.training for n, m in model.named_modules()}.items()
    assert not any(module.training for module in model.modules())

    output = model(x)
    torch.testing.assert_close(output, reference_output(model, x), rtol=1e-9, atol=1e-9)
    assert output.shape == plain.shape
    # 0.987 at the features and again at the output, rather than a quarter
    change, default_change = distance(opened(x), plain), distance(output, plain)
    assert 0 < change < 0.2 and change < default_change / 3

    found = gradients(model, x)
    expected = with_gradient | {n for n, _ in model.named_parameters() if ".cbam_" in n}
    assert found.keys() == expected
    # Both layers of a small MLP may lie behind a dead ReLU.
    assert all(found[n].abs().max() > 0 for n in expected if ".cbam_" in n and ".fc" not in n)

    # Nothing random was drawn but the weights of the CBAMs.
    torch.set_rng_state(random_state)
    for cbam in cbams(model).values():
        again = cbam_ext.CBAM(cbam.in_channels, dtype=torch.float64)
        assert torch.equal(again.spatial.conv.weight, cbam.spatial.conv.weight)


def test_training_mode_is_taken_over_and_statistics_stay():
    model = build("DeepLabV3Plus").train()
    before = copy.deepcopy(model.state_dict())
    add_cbam(model, norm_layer="batchnorm")
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("architecture", "where", "stages", "output"),
    [
        ("DeepLabV3Plus", "encoder", [2, 5], False),
        ("DeepLabV3Plus", "skips", [2], False),
        ("DeepLabV3Plus", "bottleneck", [5], False),
        ("DeepLabV3Plus", "decoder", [], True),
        ("DeepLabV3Plus", 2, [2], False),
        ("DeepLabV3Plus", ["decoder", 5], [5], True),
        ("Unet", ("skips", 1), [1, 2, 3, 4], False),
        ("Unet", ["bottleneck", 3], [3, 5], False),
        ("PSPNet", ["encoder", "bottleneck"], [3], False),
    ],
    ids=str,
)
def test_where(architecture, where, stages, output):
    model = add_cbam(build(architecture), where)
    assert stages_of(model) == stages
    assert ("decoder.cbam_output" in cbams(model)) is output
    model(image())


def test_the_image_itself_on_request():
    model = add_cbam(build("FPN", encoder_depth=3), [0])
    assert cbams(model)["decoder.cbam_features.0"].in_channels == 3


@pytest.mark.parametrize(
    ("architecture", "where", "error", "message"),
    [
        ("PSPNet", "skips", ValueError, "PSPNet .*no where='skips'.*'encoder', 'bottleneck', 'dec"),
        ("DeepLabV3Plus", 7, ValueError, "where=7; there are .* the stages 2, 5, which"),
        ("DeepLabV3Plus", ["encoder", 3], ValueError, "where=3"),
        ("DeepLabV3Plus", -1, ValueError, "where=-1"),
        ("Unet", 0, ValueError, "where=0"),
        ("Unet", "middle", ValueError, "'bottleneck', 'decoder', 'residual' or the number"),
        ("Unet", [], ValueError, "where is empty"),
        ("Unet", True, TypeError, "where must be one of .* got True"),
        ("Unet", [1.0], TypeError, "where must be one of"),
        ("Unet", None, TypeError, "where must be one of"),
    ],
    ids=str,
)
def test_a_place_that_is_not_there_names_those_that_are(architecture, where, error, message):
    model = build(architecture)
    before = str(model), dict(model.config)
    with pytest.raises(error, match=message):
        add_cbam(model, where)
    assert (str(model), model.config) == before and not model.decoder._forward_pre_hooks
    model(image())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 3}, "unknown option 'kernel'.*reduction, kernel_size"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"norm_layer": "layernorm"}, "unknown norm_layer 'layernorm'.*batchnorm, instancenorm"),
        ({"init": "zero"}, "init must be 'default' or 'identity', or a number .* got 'zero'"),
        ({"init": "identity", "mlp_bias": False}, "leave out mlp_bias=False"),
        ({"init": "identity", "conv_bias": False}, "leave out conv_bias=False"),
        ({"init": "identity", "norm_layer": nn.InstanceNorm2d}, "InstanceNorm2d does not have"),
    ],
    ids=str,
)
def test_bad_options_change_nothing(options, message):
    model = build("FPN")
    before = str(model), dict(model.config)
    with pytest.raises(ValueError, match=message):
        add_cbam(model, **options)
    assert (str(model), model.config) == before


def test_a_second_call_and_other_models_are_refused():
    model = add_cbam(build("FPN"), "decoder")
    with pytest.raises(ValueError, match="name all places in one call"):
        add_cbam(model, "skips")
    for thing in (nn.Sequential(model), nn.Identity(), "fpn", None):
        with pytest.raises(TypeError, match=f"got {type(thing).__name__}"):
            add_cbam(thing)


def test_options_reach_every_cbam():
    model = add_cbam(
        build("FPN"), ["encoder", "decoder"], reduction=4, kernel_size=3, norm_layer="batchnorm"
    )
    for cbam in cbams(model).values():
        expected = cbam_ext.CBAM(
            cbam.in_channels, reduction=4, kernel_size=3, norm_layer=nn.BatchNorm2d
        )
        assert str(cbam) == str(expected.eval())


def test_half_models_and_meta_models():
    model = add_cbam(build("DeepLabV3Plus").bfloat16(), ["encoder", "decoder"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(image().bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        model = build("DeepLabV3Plus")
    add_cbam(model, ["encoder", "decoder"], init="identity")
    assert all(p.is_meta for p in model.parameters())


def test_under_inference_mode_and_no_grad():
    for mode in (torch.no_grad, torch.inference_mode):
        model = build("DeepLabV3Plus")
        with mode():
            assert stages_of(add_cbam(model)) == [2, 5]


def test_frozen_encoders_classifiers_and_pruning():
    model = build("Unet", aux_params={"classes": 4}, decoder_attention_type="scse")
    x = image()
    labels = model(x)[1]
    add_cbam(model, ["encoder", "decoder"])
    assert torch.equal(model(x)[1], labels)  # the classifier reads the encoder's own features
    cbam_ext.smp.prune_unused(model)
    model.freeze_encoder()
    masks, labels = model.train()(x)
    (masks.square().sum() + labels.sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("encoder."), name


# ------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("norm", [None, "batchnorm", "instancenorm"])
def test_identity_opens_the_gates(norm):
    model = add_cbam(build("FPN"), ["encoder", "decoder"], init="identity", norm_layer=norm)
    gate = torch.tensor(5.0).sigmoid()
    for mode in (True, False):
        for cbam in cbams(model.train(mode)).values():
            for found in cbam.attention(torch.rand(2, cbam.in_channels, 8, 8)):
                torch.testing.assert_close(found, gate.expand_as(found))


@pytest.mark.parametrize("norm", [None, "batchnorm"])
def test_identity_learns_from_the_second_step_on(norm):
    model = add_cbam(
        build("DeepLabV3Plus"), ["encoder", "decoder"], init="identity", norm_layer=norm
    )
    model.double().eval()  # a single dropped-out channel may hide a gradient
    for cbam in cbams(model).values():  # one hidden unit may be dead from the start
        assert (cbam.channel.fc1.weight != 0).all()
        nn.init.constant_(cbam.channel.fc1.bias, 0.5)
        nn.init.uniform_(cbam.channel.fc1.weight)
    x = image().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    last = "spatial.conv" if norm is None else "spatial.norm"
    waiting = ["channel.fc1.weight", "channel.fc1.bias"]
    if norm is not None:
        waiting.append("spatial.conv.weight")
    for step in range(2):
        gradients(model, x)
        for place, cbam in cbams(model).items():
            for name, parameter in cbam.named_parameters():
                moves = bool((parameter.grad != 0).any())
                assert moves == (step == 1 or name not in waiting), (step, place, name)
            assert cbam.get_parameter(f"{last}.weight").grad.abs().max() > 0
        optimizer.step()


# ------------------------------------------------------------------------------ tools


@pytest.mark.slow
def test_a_model_that_was_compiled_before() -> None:
    """Compiled code would not call the hooks."""
    model = build(SMALL_UNET)
    model.compile(backend="eager")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        add_cbam(model)
        torch.testing.assert_close(model(x), model.forward(x))
        assert not torch.allclose(model(x), before, rtol=1e-3)


def test_hooks_of_others_see_no_meta_tensors() -> None:
    seen: list[float] = []
    model = smp.Unet("resnet18", encoder_weights=None)
    block = model.decoder.blocks[0]
    block.register_forward_hook(lambda module, args, output: seen.append(output.mean().item()))
    add_cbam(model)
    assert not seen
    model.eval()(torch.randn(1, 3, 64, 64))
    assert len(seen) == 1


def test_where_takes_any_numbers() -> None:
    places = [torch.tensor(2), 3]
    model = add_cbam(smp.FPN("resnet18", encoder_weights=None), places)
    assert model.config["cbam"]["where"] == [2, 3]
    model = add_cbam(smp.FPN("resnet18", encoder_weights=None), range(2, 4))
    assert model.config["cbam"]["where"] == [2, 3]
    model = add_cbam(smp.FPN("resnet18", encoder_weights=None), ("skips",))
    assert model.config["cbam"]["where"] in ("skips", ["skips"])


def test_copies_compute_the_same(tmp_path):
    model = add_cbam(build("DeepLabV3Plus"), ["encoder", "decoder"])
    x = image()
    expected = model(x)
    torch.save(model, tmp_path / "model.pt")
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
    }
    for name, duplicate in copies.items():
        assert torch.equal(duplicate(x), expected), name
        with torch.no_grad():  # and they are on their own
            duplicate.decoder.cbam_output.spatial.conv.weight.add_(1)
        assert not torch.equal(duplicate(x), expected), name
    assert torch.equal(model(x), expected)


def test_hooks_of_a_loading_process_do_not_take_the_place_of_ours(monkeypatch):
    """Hooks are numbered from 0 in each process, and two with one number replace each other."""
    monkeypatch.setattr(RemovableHandle, "next_id", 3)
    model = add_cbam(build("DeepLabV3Plus"), ["encoder", "decoder"])
    x = image()
    expected, saved = model(x), pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    loaded = pickle.loads(saved)
    for register in (
        loaded.decoder.register_forward_pre_hook,
        loaded.decoder.register_forward_hook,
    ):
        for _ in range(10):
            register(lambda *_: None)
    assert torch.equal(loaded(x), expected)


def test_state_dicts():
    model, x = add_cbam(build("FPN"), "skips"), image()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = add_cbam(build("FPN"), "skips")
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))
    # Weights of the model without CBAM, for fine-tuning
    plain = build("FPN")
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("decoder.cbam_features.") for key in missing)


@pytest.mark.slow
def test_compile_fullgraph():
    model, x = add_cbam(build(SMALL_UNET), ["encoder", "decoder"]), image()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    upstream = torch.randn_like(model(x))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    found, expected = gradients(compiled, x, upstream), gradients(model, x, upstream)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        other = found["_orig_mod." + name]
        torch.testing.assert_close(other, gradient, rtol=0, atol=1e-3 * scale + 1e-6, msg=name)


@pytest.mark.one_quick
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (SMALL_UNET, "inductor"),
        (Case("DPT", [0], VIT, {"encoder_depth": 1}, 224), "eager"),
        (Case("DeepLabV3Plus", [2, 3], options={"encoder_depth": 3}), "eager"),
    ],
    ids=str,
)
def test_decoders_compile_fullgraph(case, backend):
    model = add_cbam(build(case), ["encoder", "decoder"])
    torch._dynamo.reset()
    with torch.no_grad():
        features = model.encoder(image(case.size))
        arguments = features if case.architecture == "DPT" else (features,)
        found = torch.compile(model.decoder, fullgraph=True, backend=backend)(*arguments)
        torch.testing.assert_close(found, model.decoder(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.one_quick
@pytest.mark.parametrize("architecture", ["UnetPlusPlus", "DeepLabV3Plus"])
def test_export(architecture):
    small = {"encoder_depth": 3}
    if architecture == "UnetPlusPlus":
        small["decoder_channels"] = (16, 8, 8)
    model, x = add_cbam(build(architecture, **small), ["encoder", "decoder"]), image()
    exported = torch.export.export(model, (x,))
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.cbam.forward.default) == len(cbams(model))
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.one_quick
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "where"),
    [("FPN", ["encoder", "decoder"]), ("Linknet", "skips"), ("PSPNet", "decoder")],
    ids=str,
)
def test_torchscript(architecture, where, tmp_path):
    model, x = add_cbam(build(architecture, encoder_depth=3), where), image()
    torch.jit.script(model).save(tmp_path / "model.ts")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(x), model(x))


def test_to_plain_keeps_the_places():
    model, x = add_cbam(build("DeepLabV3Plus"), ["encoder", "decoder"]), image()
    plain = cbam_ext.conversion.to_plain(model)
    assert not cbams(plain) and plain.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(plain(x), model(x))


def test_examples_in_docstrings():
    for module in (cbam_ext.smp, cbam_ext.smp.placement, cbam_ext.smp.registration):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed, module.__name__
    cbam_ext.smp.unregister()
