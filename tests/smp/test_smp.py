"""CBAM in segmentation_models_pytorch: registering, building, saving, compiling, pruning."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import cbam_ext.smp

from support.placements import make_gates_tell

Attention = smp.base.modules.Attention
ORIGINAL_INIT = Attention.__init__
FULL_OPTIONS = {
    "type": "cbam",
    "reduction": 8,
    "kernel_size": 3,
    "mlp_bias": True,
    "conv_bias": True,
    "norm_layer": "batchnorm",
}
CBAM_TYPES = [
    pytest.param("cbam", id="name"),
    pytest.param(FULL_OPTIONS, id="dict"),
]


@pytest.fixture(autouse=True)
def unregister_afterwards():
    yield
    cbam_ext.smp.unregister()
    assert Attention.__init__ is ORIGINAL_INIT


@pytest.fixture
def registered():
    cbam_ext.smp.register()


def build(attention="cbam", architecture=smp.Unet, encoder="resnet18", **options) -> nn.Module:
    """A model with a slim decoder and gates that hang on their input, as after some training.

    SCSE of smp cannot have fewer than 16 channels.
    """
    model = build_new(attention, architecture, encoder, **options)
    make_gates_tell(model)
    return model


def build_new(attention, architecture=smp.Unet, encoder="resnet18", **options) -> nn.Module:
    depth = options.get("encoder_depth", 5)
    options = {"decoder_channels": (32, 32, 16, 16, 16)[:depth], **options}
    return architecture(
        encoder, encoder_weights=None, decoder_attention_type=attention, **options
    ).eval()


def image(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Attention)}


def cbams(model: nn.Module) -> list[cbam_ext.CBAM]:
    return [m for m in model.modules() if isinstance(m, cbam_ext.CBAM)]


# ------------------------------------------------------------------------------ registering


@pytest.mark.slow
def test_importing_registers_nothing_and_needs_no_smp():
    """A fresh process in which smp cannot be imported: only the first use complains."""
    code = """
import sys
sys.modules["segmentation_models_pytorch"] = None
import torch, cbam_ext.smp
cbam_ext.smp.unregister()
for use in (cbam_ext.smp.register, lambda: cbam_ext.smp.prune_unused(torch.nn.Identity())):
    try:
        use()
    except ImportError as error:
        assert "pip install segmentation-models-pytorch" in str(error), error
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ValueError, match="cbam"):
        build("cbam")


def test_a_missing_dependency_of_smp_is_not_mistaken_for_smp(monkeypatch):
    broken = ModuleNotFoundError("No module named 'timm'", name="timm")

    def fail(name, *_):
        raise broken

    monkeypatch.delitem(sys.modules, "segmentation_models_pytorch")
    monkeypatch.setattr("builtins.__import__", fail)
    try:
        cbam_ext.smp.register()
        raised = None
    except ImportError as error:
        raised = error
    finally:
        monkeypatch.undo()
    assert raised is broken


def test_register_is_idempotent_and_one_unregister_undoes_it():
    for _ in range(3):
        cbam_ext.smp.register()
    assert len(cbams(build("cbam"))) == 10
    assert Attention is smp.base.Attention
    cbam_ext.smp.unregister()
    assert Attention.__init__ is ORIGINAL_INIT
    with pytest.raises(ValueError, match="cbam"):
        build("cbam")
    cbam_ext.smp.unregister()  # and once more does no harm


def test_unregister_leaves_a_later_patch_of_others_alone(monkeypatch, registered):
    ours = Attention.__init__

    @functools.wraps(ours)
    def theirs(self, name, **params):
        ours(self, name, **params)

    monkeypatch.setattr(Attention, "__init__", theirs)
    cbam_ext.smp.unregister()
    assert Attention.__init__ is theirs
    monkeypatch.undo()
    assert Attention.__init__ is ours


def test_register_leaves_a_cbam_of_smp_itself_alone(monkeypatch):
    def upstream(self, name, **params):
        nn.Module.__init__(self)
        self.attention = nn.Identity()

    monkeypatch.setattr(Attention, "__init__", upstream)
    with pytest.warns(UserWarning, match="already accepts"):
        cbam_ext.smp.register()
    assert Attention.__init__ is upstream


def test_register_refuses_an_unknown_signature(monkeypatch):
    def changed(self, kind, channels):
        nn.Module.__init__(self)

    monkeypatch.setattr(Attention, "__init__", changed)
    with pytest.raises(RuntimeError, match=r"\(self, name, \*\*params\).*\(self, kind, channels\)"):
        cbam_ext.smp.register()
    assert Attention.__init__ is changed


@pytest.mark.parametrize("kind", ["scse", None])
def test_other_attention_stays_as_it_was(kind):
    torch.manual_seed(0)
    before = build_new(kind)
    cbam_ext.smp.register()
    torch.manual_seed(0)
    after = build_new(kind)
    assert str(after) == str(before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(after.state_dict().values(), before.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("kind", ["CBAM", "se", {"type": "scse"}, {"reduction": 8}, {}], ids=str)
def test_unknown_kinds_raise_the_error_of_smp(kind):
    with pytest.raises(ValueError, match="is not implemented") as before:
        build(kind)
    cbam_ext.smp.register()
    with pytest.raises(ValueError, match="is not implemented") as after:
        build(kind)
    assert str(after.value) == str(before.value)


# ------------------------------------------------------------------------------ building


@pytest.mark.parametrize("architecture", [smp.Unet, smp.UnetPlusPlus])
def test_every_attention_becomes_a_cbam_that_learns(architecture, registered):
    model = cbam_ext.smp.prune_unused(build("cbam", architecture)).train()
    held = list(attentions(model).values())
    assert held and all(isinstance(attention.attention, cbam_ext.CBAM) for attention in held)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    output = model(image())
    output.backward(torch.randn_like(output))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "fc" not in name:  # both layers of a small MLP may lie behind a dead ReLU
            assert parameter.grad.abs().max() > 0, name
    optimizer.step()
    assert any(
        not torch.equal(value, before[name])
        for name, value in model.state_dict().items()
        if "channel.fc" in name
    )


def test_create_model_takes_the_name_and_the_dict(registered):
    for kind, kernel_size in (("cbam", 7), (FULL_OPTIONS, 3)):
        model = smp.create_model(
            "unet", "resnet18", encoder_weights=None, decoder_attention_type=kind
        )
        assert [m.kernel_size for m in cbams(model)] == [kernel_size] * 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"reduction": 4}, {"reduction": 4}),
        ({"kernel_size": 5}, {"kernel_size": 5}),
        ({"hidden_channels": 3}, {"hidden_channels": 3}),
        ({"mlp_bias": True}, {}),
        ({"init": "default", "mlp_bias": True}, {"init": "default", "mlp_bias": True}),
        ({"init": "default", "conv_bias": True}, {"init": "default", "conv_bias": True}),
        ({"init": "default"}, {"init": "default"}),
        ({"norm_layer": None}, {}),
        ({"norm_layer": "batchnorm"}, {"norm_layer": nn.BatchNorm2d}),
        ({"norm_layer": nn.BatchNorm2d}, {"norm_layer": nn.BatchNorm2d}),
        (
            {"norm_layer": "instancenorm"},
            {"norm_layer": functools.partial(nn.InstanceNorm2d, affine=True)},
        ),
    ],
    ids=["none", "reduction", "kernel_size", "hidden_channels", "mlp_bias", "init and mlp_bias",
         "init and conv_bias", "init", "no norm", "batchnorm", "BatchNorm2d", "instancenorm"],
)  # fmt: skip
def test_options_reach_the_module(options, expected, registered):
    expected = cbam_ext.CBAM(32, **{"init": "identity", **expected})
    given = {"type": "cbam", **options}
    model = build(given)
    assert given == {"type": "cbam", **options}  # the caller's dict is not changed
    made = model.decoder.blocks[0].attention2.attention
    assert str(made) == str(expected)
    assert {k: v.shape for k, v in made.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }
    model.train()(image()).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 3}, "unknown option 'kernel'.*reduction, kernel_size"),
        ({"in_channels": 16}, "unknown option 'in_channels'"),
        ({"norm_layer": "layernorm"}, "unknown norm_layer 'layernorm'.*batchnorm, instancenorm"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
    ],
    ids=str,
)
def test_bad_options_name_the_good_ones(options, message, registered):
    with pytest.raises(ValueError, match=message):
        build({"type": "cbam", **options})


@pytest.mark.one_quick
@pytest.mark.parametrize("kind", CBAM_TYPES)
def test_unetplusplus_with_a_tiny_encoder(kind, registered):
    model = smp.UnetPlusPlus(
        "tu-mobilenetv3_small_050", encoder_weights=None, decoder_attention_type=kind
    )
    assert min(m.in_channels for m in cbams(model)) == 8
    assert min(m.hidden_channels for m in cbams(model)) == 1
    output = model.train()(image())
    output.sum().backward()
    assert output.shape == (2, 1, 64, 64) and output.isfinite().all()


def test_the_model_computes_what_the_reference_does(registered, monkeypatch):
    """Float64, so that nothing but a wrong operator can tell the two apart."""
    model = build("cbam").double()
    x = image().double()
    expected = model(x)
    monkeypatch.setattr(
        cbam_ext.module.functional, "cbam", lambda *arguments: cbam_ext.reference.cbam(*arguments)
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", [smp.Unet, smp.UnetPlusPlus])
def test_initialisation_by_smp_leaves_gates_open_and_alive(architecture, registered):
    """smp re-initialises every layer of a decoder after it was built."""
    kind = {"type": "cbam", "norm_layer": "batchnorm", "init": "default"}
    model = build_new(kind, architecture, decoder_channels=(256, 128, 64, 32, 16))
    varied = []
    for module in cbams(model):
        for parameter in module.parameters():
            assert parameter.isfinite().all()
        assert 0 < module.spatial.conv.weight.std() < 0.5
        assert 0 < module.channel.fc1.weight.std() < 0.5
        assert module.spatial.norm.momentum == 0.01
        assert module.spatial.norm.weight.item() == 1 and module.spatial.norm.bias.item() == 0
        # What a decoder feeds it: non-negative, of about unit scale.
        features = torch.randn(4, module.in_channels, 16, 16).relu()
        channel_gate, spatial_gate = module.train().attention(features)
        for gate in (channel_gate, spatial_gate):
            assert ((gate > 0.01) & (gate < 0.99)).float().mean() > 0.5
        assert spatial_gate.std() > 0.01
        varied.append(channel_gate.std() > 0.01)
    # Not all: the ReLU of a small MLP may be dead to begin with.
    assert sum(varied) > len(varied) / 2


# ------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("kind", CBAM_TYPES)
def test_built_models_survive_copies_and_outlive_the_registration(kind, registered, tmp_path):
    model, x = build(kind), image()
    expected = model(x)
    cbam_ext.smp.unregister()
    torch.save(model, tmp_path / "model.pt")
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
        "model itself": model,
    }
    for name, duplicate in copies.items():
        assert torch.equal(duplicate(x), expected), name


def test_models_built_before_registering_can_be_pickled_after(registered):
    cbam_ext.smp.unregister()
    model, x = build("scse"), image()
    cbam_ext.smp.register()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("kind", CBAM_TYPES)
def test_state_dict_round_trip(kind, registered):
    model, x = build(kind), image()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = build(kind)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))


@pytest.mark.one_quick
@pytest.mark.parametrize("kind", CBAM_TYPES)
@pytest.mark.parametrize("architecture", [smp.Unet, smp.UnetPlusPlus])
def test_save_pretrained_round_trip(kind, architecture, registered, tmp_path):
    model, x = build(kind, architecture), image()
    model.save_pretrained(tmp_path)
    for load in (smp.from_pretrained, architecture.from_pretrained):
        loaded = load(tmp_path).eval()
        assert str(loaded) == str(model)
        assert torch.equal(loaded(x), model(x))
    cbam_ext.smp.unregister()
    with pytest.raises(ValueError, match="is not implemented"):
        smp.from_pretrained(tmp_path)


@pytest.mark.one_quick
@pytest.mark.parametrize("kind", CBAM_TYPES)
def test_export(kind, registered):
    model, x = build(kind), image()
    exported = torch.export.export(model, (x,))
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.cbam.forward.default) == 9  # of 10, one never runs
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.one_quick
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("kind", CBAM_TYPES)
def test_torchscript(kind, how, registered, tmp_path):
    model = build(kind)
    whole = torch.jit.script(model) if how == "script" else torch.jit.trace(model, image())
    assert str(whole.inlined_graph).count("cbam::forward" if kind == "cbam" else "cbam::") >= 9
    whole.save(tmp_path / "model.ts")
    loaded, x = torch.jit.load(tmp_path / "model.ts"), image(3, 96)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_compilation_serves_all_sizes(registered):
    model = build("cbam", encoder_depth=2).train()
    compiled = torch.compile(
        copy.deepcopy(model), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for i, (batch, size) in enumerate([(4, 40), (2, 52), (5, 28)]):
        x = image(batch, size)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            found = compiled(x)
            found.square().sum().backward()
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.one_quick
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", CBAM_TYPES)
def test_compile_fullgraph(backend, kind, registered):
    # A shallow model, because compiling takes most of the time of these tests.
    model = build(kind, encoder_depth=2).train()
    assert_compiles(model, backend)


@pytest.mark.slow
def test_compile_fullgraph_inductor(registered):
    model = build("cbam", encoder_depth=2)
    torch._dynamo.reset()
    compiled = torch.compile(model.decoder, fullgraph=True)
    features = [f.detach() for f in model.encoder(image())]
    torch.testing.assert_close(compiled(features), model.decoder(features), rtol=1e-4, atol=1e-4)


def assert_compiles(model: nn.Module, backend: str) -> None:
    """Output and every gradient of the compiled model are those of the plain one."""
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    x = image()
    output, expected = torch.compile(model, backend=backend, fullgraph=True)(x), twin(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(expected)
    output.backward(upstream)
    expected.backward(upstream)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:  # what the model never runs
            assert parameter.grad is None, name
            continue
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=0, atol=1e-3 * scale + 1e-6, msg=name
        )


# ------------------------------------------------------------------------------ pruning

PRUNED_MODELS = [
    pytest.param(smp.Unet, "resnet18", 5, id="unet"),
    pytest.param(smp.Unet, "resnet18", 3, id="unet-shallow"),
    pytest.param(smp.UnetPlusPlus, "resnet18", 5, id="unetplusplus"),
    pytest.param(smp.UnetPlusPlus, "resnet18", 3, id="unetplusplus-shallow"),
    # The encoder has no stage at half resolution: a skip of 0 channels, for which attention runs.
    pytest.param(smp.Unet, "tu-convnext_atto", 4, id="unet-empty-skip"),
    pytest.param(smp.UnetPlusPlus, "tu-convnext_atto", 4, id="unetplusplus-empty-skip"),
]


def never_run(model: nn.Module) -> set[str]:
    """The names of the attentions that one forward pass does not call."""
    held = attentions(model)
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in held.items()
    ]
    model(image())
    for handle in handles:
        handle.remove()
    return set(held) - called


@pytest.mark.parametrize("kind", ["cbam", "scse"])
@pytest.mark.parametrize(("architecture", "encoder", "depth"), PRUNED_MODELS)
def test_prune_unused_takes_what_never_runs(architecture, encoder, depth, kind, registered):
    model = build(kind, architecture, encoder, encoder_depth=depth)
    idle, x = never_run(model), image()
    assert len(idle) == 1
    expected, keys = model(x), set(model.state_dict())
    assert cbam_ext.smp.prune_unused(model) is model
    assert never_run(model) == set()
    assert torch.equal(model(x), expected)
    (name,) = idle
    assert type(model.get_submodule(name)) is nn.Identity
    assert keys - set(model.state_dict()) == {key for key in keys if key.startswith(name + ".")}

    pruned = str(model)
    cbam_ext.smp.prune_unused(model)
    assert str(model) == pruned


def test_prune_unused_leaves_models_without_such_attention_alone(registered):
    for model in (
        build(None),
        smp.FPN("resnet18", encoder_weights=None),
        smp.Linknet("resnet18", encoder_weights=None),
    ):
        before = str(model)
        assert cbam_ext.smp.prune_unused(model) is model
        assert str(model) == before


def test_prune_unused_finds_a_model_inside_another_module(registered):
    outer = nn.Sequential(build("cbam"), nn.Sigmoid())
    cbam_ext.smp.prune_unused(outer)
    assert never_run(outer) == set()


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "unet", None], ids=["module", "str", "None"])
def test_prune_unused_refuses_what_is_no_model_of_smp(thing):
    with pytest.raises(TypeError, match=f"got {type(thing).__name__}"):
        cbam_ext.smp.prune_unused(thing)


def test_pruned_models_come_back_from_pretrained(registered, tmp_path):
    """The way that the documentation of prune_unused names."""
    model, x = cbam_ext.smp.prune_unused(build("cbam")), image()
    model.save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path, strict=False).eval()
    assert torch.equal(cbam_ext.smp.prune_unused(loaded)(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()
