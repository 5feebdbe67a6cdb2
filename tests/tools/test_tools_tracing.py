"""Tracers and compilers around modules whose layers are called: torch.fx, compile, export, jit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import cbam_ext

from support.nets import (
    TOLERANCE,
    assert_alike,
    assert_same,
    both,
    evaluate,
    images,
    layer_of,
    make_nets,
    make_pair,
    put_layer,
    step,
    why,
)

pytestmark = pytest.mark.tools


def features() -> Tensor:
    return torch.randn(2, 16, 8, 9, dtype=torch.float64)


def _prune(module: nn.Module) -> None:
    for name in ("channel.fc1", "spatial.conv"):
        prune.custom_from_mask(
            layer_of(module, name), "weight", layer_of(module, name).weight.detach() > 0
        )


def _hook(module: nn.Module) -> None:
    layer_of(module, "channel.fc2").register_forward_hook(lambda m, args, out: out * 0.5 + 0.1)


def _hook_gate(module: nn.Module) -> None:
    layer_of(module, "spatial").register_forward_hook(lambda m, args, out: out * 0.5)


def _dilate(module: nn.Module) -> None:
    conv = layer_of(module, "spatial.conv")
    conv.dilation, conv.padding = (2, 2), (6, 6)


def _reflect(module: nn.Module) -> None:
    layer_of(module, "spatial.conv").padding_mode = "replicate"
    layer_of(module, "spatial.conv")._reversed_padding_repeated_twice = (3, 3, 3, 3)


def _patch(module: nn.Module) -> None:
    layer = layer_of(module, "channel.fc1")
    forward = layer.forward
    layer.forward = lambda x: torch.tanh(forward(x))


def _replace(module: nn.Module) -> None:
    layer = layer_of(module, "channel.fc1")
    put_layer(module, "channel.fc1", nn.Sequential(layer, nn.Tanh()))


def _norm_weights(module: nn.Module) -> None:
    parametrizations.weight_norm(layer_of(module, "spatial.conv"))


def _norm_spectrally(module: nn.Module) -> None:
    parametrizations.spectral_norm(layer_of(module, "channel.fc1"))


TREATMENTS: dict[str, Callable[[nn.Module], None]] = {
    "pruned": _prune,
    "hooked": _hook,
    "hooked gate": _hook_gate,
    "dilated": _dilate,
    "other padding": _reflect,
    "patched": _patch,
    "replaced": _replace,
    "weight_norm": _norm_weights,
    "spectral_norm": _norm_spectrally,
}


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _only(*names: str) -> Any:
    return pytest.mark.parametrize("treatment", names)


# ------------------------------------------------------------------------------ torch.compile


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("treatment", "backend"),
    [*((name, "eager") for name in TREATMENTS), ("pruned", "aot_eager"), ("hooked", "aot_eager")],
)
def test_compiled_after_the_treatment(treatment: str, backend: str) -> None:
    x = features()
    pair = make_pair(norm_layer=nn.BatchNorm2d)
    both(TREATMENTS[treatment], pair)
    compiled = both(lambda m: torch.compile(m, backend=backend, fullgraph=True), pair)
    assert_same(*both(lambda m: step(m.train(), x), compiled))
    ours, plain = both(lambda m: evaluate(m, x), compiled)
    assert_same(ours, plain)
    assert_same(ours, evaluate(pair[0], x))
    assert_same(dict(pair[0].state_dict()), dict(pair[1].state_dict()))


@pytest.mark.usefixtures("fresh")
@_only(*TREATMENTS)
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
def test_compiled_before_the_treatment(treatment: str) -> None:
    """As PyTorch is by default, it overlooks hooks that come later, in plain chains too."""
    x = features()
    pair = make_pair()
    compiled = both(lambda m: torch.compile(m, backend="eager"), pair)
    before = both(lambda m: evaluate(m, x), compiled)
    assert_same(*before)
    both(TREATMENTS[treatment], pair)
    after = both(lambda m: evaluate(m, x), compiled)
    assert_same(*after)
    if treatment != "weight_norm":  # which leaves the weight as it is
        assert not torch.allclose(after[1], before[1])
    assert_same(*both(lambda m: step(m.train(), x), compiled))
    assert_same(*both(lambda m: evaluate(m, x), pair))


@pytest.mark.usefixtures("fresh")
@_only("hooked", "hooked gate", "pruned", "spectral_norm")
def test_compiled_before_the_treatment_by_default(treatment: str) -> None:
    """Compiled code of a fused CBAM asks for hooks; that of a chain overlooks later ones."""
    x = features()
    pair = make_pair()
    compiled = torch.compile(pair[0], backend="eager")
    assert_same(evaluate(compiled, x), evaluate(pair[1], x))
    both(TREATMENTS[treatment], pair)
    assert_same(evaluate(compiled, x), evaluate(pair[1], x))
    assert_alike(*pair, x)


@pytest.mark.usefixtures("fresh")
def test_a_hook_removed_from_a_compiled_module() -> None:
    x = features()
    pair = make_pair()
    expected = evaluate(pair[1], x)
    handles = both(
        lambda m: layer_of(m, "channel.fc1").register_forward_hook(lambda m, args, out: -out), pair
    )
    compiled = both(lambda m: torch.compile(m, backend="eager"), pair)
    assert_same(*both(lambda m: evaluate(m, x), compiled))
    for handle in handles:
        handle.remove()
    for module in compiled:
        assert_same(evaluate(module, x), expected)


@pytest.mark.usefixtures("fresh")
def test_the_module_s_own_compile() -> None:
    """module.compile() in place."""
    x = features()
    pair = make_pair()
    for module in pair:
        module.compile(backend="eager")
    assert_alike(*pair, x)
    both(_hook, pair)
    torch._dynamo.reset()  # for the chain, which would overlook the hook
    assert_alike(*pair, x)
    for module in pair:
        layer_of(module, "spatial.conv").compile(backend="eager")
    assert_alike(*pair, x)


@pytest.mark.usefixtures("fresh")
@_only("", "pruned", "dilated")
def test_compiled_modules_are_saved(treatment: str) -> None:
    x = features()
    pair = make_pair()
    if treatment:
        both(TREATMENTS[treatment], pair)
    for compile_ in (lambda m: torch.compile(m, backend="eager"), _compile_in_place):
        compiled = both(compile_, pair)
        expected = both(lambda m: evaluate(m, x), compiled)[1]
        assert compiled[0].state_dict().keys() == compiled[1].state_dict().keys()

        def save(module: nn.Module) -> nn.Module:
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

        for module in both(save, compiled):
            assert_same(evaluate(module, x), expected)


def _compile_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


# ------------------------------------------------------------------------------ torch.export


@pytest.mark.parametrize(
    ("treatment", "strict"),
    [*((name, False) for name in TREATMENTS), *((name, True) for name in ("pruned", "dilated"))],
)
def test_export(treatment: str, strict: bool) -> None:
    x = images()
    pair = make_nets()
    both(TREATMENTS[treatment], pair)
    both(nn.Module.eval, pair)

    def export(module: nn.Module) -> Tensor:
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
        more = torch.cat([x, x])
        return program.module()(more)

    with torch.no_grad():
        ours, plain = both(export, pair)
    assert_same(ours, plain)
    assert_same(ours, evaluate(pair[1], torch.cat([x, x])))


# -------------------------------------------------------------------------------- TorchScript


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@_only(*TREATMENTS)
@pytest.mark.parametrize("way", ["script", "trace"])
def test_jit(way: str, treatment: str) -> None:
    """Where the plain chain compiles, so does ours; a trace always gives the same."""
    x = images()
    pair = make_nets()
    both(TREATMENTS[treatment], pair)

    def compiled(module: nn.Module) -> Any:
        module.eval()
        try:
            done = torch.jit.trace(module, x) if way == "trace" else torch.jit.script(module)
            return evaluate(done, x)
        except Exception as error:
            assert way == "script"
            return type(error).__name__

    ours, plain = both(compiled, pair)
    if isinstance(plain, str):
        # An error, or the right result.
        assert isinstance(ours, str) or torch.allclose(ours, evaluate(pair[1], x), **TOLERANCE)
    else:
        assert_same(ours, plain)
        # TorchScript copies neither patches nor hooks into what it compiles, without a word.
        if way == "trace":
            assert_same(ours, evaluate(pair[1], x))


# ----------------------------------------------------------------------------------- torch.fx


def _trace(module: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(module)


@pytest.mark.parametrize("treatment", ["", "pruned", "hooked", "dilated", "replaced"])
@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle", "again"])
def test_fx_of_a_model(way: str, treatment: str) -> None:
    x = images()
    pair = make_nets(norm_layer=nn.BatchNorm2d)
    if treatment:
        with torch.no_grad():  # a pruned weight with a graph cannot be copied
            both(TREATMENTS[treatment], pair)

    def trace(module: nn.Module) -> nn.Module:
        graph = _trace(module)
        if way == "deepcopy":
            graph = copy.deepcopy(graph)
        elif way == "pickle":
            graph = pickle.loads(pickle.dumps(graph))
        elif way == "again":
            graph = _trace(graph)
        return graph

    if treatment == "hooked" and way == "pickle":
        return  # the hook is a lambda
    ours, plain = both(trace, pair)
    assert_same(*both(lambda m: step(m.train(), x), (ours, plain)))
    assert_same(*both(lambda m: evaluate(m, x), (ours, plain)))
    assert "call_module" in {node.op for node in ours.graph.nodes if node.target == "cbam"}
    assert isinstance(ours.get_submodule("cbam"), cbam_ext.CBAM)


@pytest.mark.parametrize("treatment", ["", "pruned", "hooked", "dilated", "replaced"])
@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d], ids=["", "norm"])
def test_fx_of_the_module_itself(norm_layer: Any, treatment: str) -> None:
    x = features()
    pair = make_pair(norm_layer=norm_layer)
    if treatment:
        both(TREATMENTS[treatment], pair)
    ours, plain = both(_trace, pair)
    assert_same(*both(lambda m: m.train()(x), (ours, plain)))
    assert_same(*both(lambda m: evaluate(m, x), (ours, plain)))
    again = copy.deepcopy(ours)
    assert_same(evaluate(again, x), evaluate(plain, x))


@pytest.mark.parametrize("treatment", ["", "pruned", "dilated"])
def test_feature_extractor_of_torchvision(treatment: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    x = images()
    pair = make_nets()
    if treatment:
        both(TREATMENTS[treatment], pair)
    assert "cbam" in get_graph_node_names(pair[0])[1]

    def extract(module: nn.Module) -> Any:
        return evaluate(create_feature_extractor(module, {"cbam": "cbam", "head": "head"}), x)

    assert_same(*both(extract, pair))


@pytest.mark.parametrize("treatment", ["", "pruned", "dilated"])
def test_feature_extractor_of_timm(treatment: str) -> None:
    from timm.models import GraphExtractNet

    x = images()
    pair = make_nets()
    if treatment:
        both(TREATMENTS[treatment], pair)
    ours = evaluate(GraphExtractNet(pair[0], ["cbam", "head"]), x)
    # Nodes of the plain chain are those of its insides.
    plain = evaluate(GraphExtractNet(pair[1], ["cbam.mul_1", "head"]), x)
    assert_same(ours, plain)


def test_fx_passes_keep_what_layers_do() -> None:
    """Fusing a convolution with a norm, as torch.fx.experimental does, around a CBAM."""
    from torch.fx.experimental.optimization import fuse

    x = features()
    pair = make_pair(norm_layer=nn.BatchNorm2d)
    models = [
        nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), cbam).double() for cbam in pair
    ]
    models[1].load_state_dict(models[0].state_dict())
    assert_same(*both(lambda m: evaluate(fuse(m.eval()), x), (models[0], models[1])))
    assert why(models[0][2]) is None
