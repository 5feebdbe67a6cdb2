"""Hooks on layers and gates, and the tools that live by them: captum, pytorch-grad-cam, MONAI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.nets import (
    LAYERS,
    TOLERANCE_OF_FLOATS,
    assert_alike,
    assert_same,
    both,
    evaluate,
    images,
    layer_of,
    make_nets,
    step,
    train,
    why,
)

pytestmark = pytest.mark.tools

GATES = ("channel", "spatial")


# ------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d], ids=["", "norm"])
def test_what_hooks_see(norm_layer: Any) -> None:
    """The same inputs, outputs and gradients, in the same order, as often."""
    x = images()
    pair = make_nets(norm_layer=norm_layer)
    names = [*LAYERS, *GATES, *(["spatial.norm"] if norm_layer else [])]

    def watch(module: nn.Module) -> list[Any]:
        seen: list[Any] = []
        for name in names:
            layer = layer_of(module, name)
            layer.register_forward_pre_hook(
                lambda m, args, name=name: seen.append((f"{name} pre", args[0].detach().clone()))
            )
            layer.register_forward_hook(
                lambda m, args, out, name=name: seen.append((name, out.detach().clone()))
            )
            layer.register_full_backward_hook(
                lambda m, before, after, name=name: seen.append(
                    (f"{name} backward", before[0].clone(), after[0].clone())
                )
            )
        step(module.train(), x)
        return seen

    ours, plain = both(watch, pair)
    assert [each[0] for each in ours if "backward" not in each[0]] == [
        each[0] for each in plain if "backward" not in each[0]
    ]
    # Autograd goes through the two calls of the MLP in an order of its own.
    for name in names:
        assert_same(*(_sorted(seen, f"{name} backward") for seen in (ours, plain)))
    assert_same(*([each[1] for each in seen if len(each) == 2] for seen in (ours, plain)))


def _sorted(seen: list[Any], name: str) -> list[Any]:
    found = [each[1:] for each in seen if each[0] == name]
    return sorted(found, key=lambda each: float(each[0].sum()))


@pytest.mark.parametrize("name", [*LAYERS, *GATES])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward pre"])
def test_hooks_that_change(kind: str, name: str) -> None:
    pair = make_nets()
    x = images()

    def register(module: nn.Module) -> Any:
        layer = layer_of(module, name)
        if kind == "forward":
            return layer.register_forward_hook(lambda m, args, out: out * 0.5 + 0.1)
        if kind == "pre":
            return layer.register_forward_pre_hook(lambda m, args: (args[0].sin(),))
        if kind == "backward":
            return layer.register_full_backward_hook(lambda m, into, out: (into[0] * 2,))
        return layer.register_full_backward_pre_hook(lambda m, out: (out[0] * 2,))

    handles = both(register, pair)
    assert why(pair[0]) is not None and name in why(pair[0])
    assert_alike(*pair, x)
    assert_same(*both(lambda m: train(m, x), pair))
    for handle in handles:
        handle.remove()
    assert why(pair[0]) is None
    assert_alike(*pair, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_that_change_in_place(before: bool, name: str) -> None:
    pair = make_nets()
    x = images()

    def register(module: nn.Module) -> None:
        layer = layer_of(module, name)
        if before:
            layer.register_forward_pre_hook(lambda m, args: (args[0].mul_(2),))
        else:
            layer.register_forward_hook(lambda m, args, out: out.mul_(2))

    both(register, pair)
    assert_same(*both(lambda m: evaluate(m, x), pair))
    if not (before and name == "channel.fc2"):  # backward needs what it sees, in a chain as well
        assert_alike(*pair, x)


def test_hooks_of_all_modules() -> None:
    pair = make_nets()
    x = images()
    assert why(pair[0]) is None

    def count(module: nn.Module) -> list[str]:
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out: seen.append(type(m).__name__)
        )
        try:
            evaluate(module, x)
        finally:
            handle.remove()
        return [name for name in seen if name in ("Linear", "Conv2d")]

    ours, plain = both(count, pair)
    assert ours == plain
    assert why(pair[0]) is None


def test_hooks_on_parameters() -> None:
    pair = make_nets()
    for module in pair:
        for name in LAYERS:
            layer_of(module, name).weight.register_hook(lambda grad: 3 * grad)
    assert_alike(*pair, images())


def test_activations_collected_for_a_loss() -> None:
    """Gates that go into the loss, by hooks, as penalties on attention do."""
    x = images()
    pair = make_nets()

    def gradients(module: nn.Module) -> dict[str, Tensor]:
        kept: list[Tensor] = []
        for name in (*GATES, "spatial.conv"):
            layer_of(module, name).register_forward_hook(lambda m, args, out: kept.append(out))
        loss = module(x).square().sum() + sum(each.square().sum() for each in kept)
        loss.backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    assert_same(*both(gradients, pair))


# ------------------------------------------------------------------------------------ captum


def _layer_grad_cam(module: nn.Module, layer: nn.Module, x: Tensor) -> Any:
    from captum.attr import LayerGradCam

    return LayerGradCam(module, layer).attribute(x, target=1)


def _layer_activation(module: nn.Module, layer: nn.Module, x: Tensor) -> Any:
    from captum.attr import LayerActivation

    return LayerActivation(module, layer).attribute(x)


def _layer_integrated_gradients(module: nn.Module, layer: nn.Module, x: Tensor) -> Any:
    from captum.attr import LayerIntegratedGradients

    return LayerIntegratedGradients(module, layer).attribute(x, target=1, n_steps=5)


def _layer_gradient_x_activation(module: nn.Module, layer: nn.Module, x: Tensor) -> Any:
    from captum.attr import LayerGradientXActivation

    return LayerGradientXActivation(module, layer).attribute(x, target=1)


def _layer_conductance(module: nn.Module, layer: nn.Module, x: Tensor) -> Any:
    from captum.attr import LayerConductance

    return LayerConductance(module, layer).attribute(x, target=1, n_steps=5)


def _guided_grad_cam(module: nn.Module, layer: nn.Module, x: Tensor) -> Any:
    from captum.attr import GuidedGradCam

    return GuidedGradCam(module, layer).attribute(x, target=1)


Attribution = Callable[[nn.Module, nn.Module, Tensor], Any]
ATTRIBUTIONS: dict[str, Attribution] = {
    "LayerGradCam": _layer_grad_cam,
    "LayerActivation": _layer_activation,
    "LayerIntegratedGradients": _layer_integrated_gradients,
    "LayerGradientXActivation": _layer_gradient_x_activation,
    "LayerConductance": _layer_conductance,
    "GuidedGradCam": _guided_grad_cam,
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning:captum")
@pytest.mark.parametrize("name", ["cbam", *(f"cbam.{name}" for name in (*LAYERS, *GATES))])
@pytest.mark.parametrize("attribution", ATTRIBUTIONS)
def test_captum(attribution: str, name: str) -> None:
    x = images()
    pair = make_nets()
    before = evaluate(pair[1], x)
    attribute = ATTRIBUTIONS[attribution]
    ours, plain = both(lambda m: attribute(m.eval(), m.get_submodule(name), x.clone()), pair)
    assert isinstance(plain, Tensor) and plain.shape
    assert_same(ours, plain)
    assert why(pair[0]) is None  # its hooks are gone
    assert_same(evaluate(pair[0], x), before)


@pytest.mark.parametrize("method", ["IntegratedGradients", "Saliency", "DeepLift"])
def test_captum_of_the_input(method: str) -> None:
    import captum.attr

    x = images()
    pair = make_nets()

    def attribute(module: nn.Module) -> Any:
        explain = getattr(captum.attr, method)(module.eval())
        return explain.attribute(x.clone(), target=1)

    assert_same(*both(attribute, pair))


# ---------------------------------------------------------------------------------- heat maps


def _nets_of_opposites() -> tuple[nn.Module, nn.Module]:
    """What speaks against class 0 speaks for class 1: one of the two has a map that is not zero."""
    pair = make_nets(torch.float32)
    with torch.no_grad():
        for module in pair:
            module.classifier.weight[1] = -module.classifier.weight[0]
    return pair


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "XGradCAM", "LayerCAM"])
@pytest.mark.parametrize("name", ["cbam", "cbam.spatial", "cbam.spatial.conv"])
def test_pytorch_grad_cam(name: str, method: str) -> None:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    x = images(torch.float32)
    pair = _nets_of_opposites()

    def draw(module: nn.Module) -> Tensor:
        layers = [module.eval().get_submodule(name)]
        with getattr(pytorch_grad_cam, method)(model=module, target_layers=layers) as cam:
            targets = [[ClassifierOutputTarget(label)] * 3 for label in (0, 1)]
            return torch.cat([torch.from_numpy(cam(x, target)) for target in targets])

    ours, plain = both(draw, pair)
    assert plain.shape == (6, 16, 20)
    assert plain.std() > 0 or name.endswith("conv")  # logits may all be negative
    assert_same(ours, plain, {"rtol": 1e-3, "atol": 1e-3})
    assert why(pair[0]) is None


@pytest.mark.parametrize("name", ["cbam", "cbam.spatial", "cbam.spatial.conv"])
@pytest.mark.parametrize("method", ["GradCAM", "GradCAMpp"])
def test_monai(name: str, method: str) -> None:
    import monai.visualize

    x = images(torch.float32, 1)  # its GradCAMpp takes one image at a time
    pair = _nets_of_opposites()

    def draw(module: nn.Module) -> Tensor:
        cam = getattr(monai.visualize, method)(nn_module=module, target_layers=name)
        return torch.cat([cam(x=x, class_idx=label) for label in (0, 1)])

    ours, plain = both(draw, pair)
    assert plain.std() > 0 or name.endswith("conv")
    assert_same(ours, plain, {"rtol": 1e-3, "atol": 1e-3})


def test_monai_occlusion() -> None:
    from monai.visualize import OcclusionSensitivity

    x = images(torch.float32, 1)
    pair = make_nets(torch.float32)

    def draw(module: nn.Module) -> Tensor:
        return OcclusionSensitivity(module.eval(), mask_size=8, overlap=0.0, verbose=False)(x)[0]

    assert_same(*both(draw, pair), TOLERANCE_OF_FLOATS)
