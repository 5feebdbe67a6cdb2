"""What models are called with: one rule for visualize, measure_cost, compare_costs and convert."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import cbam_ext
from cbam_ext._inputs import Call, as_call

from support import peers


class OneTensor(nn.Module):
    """A stem, somebody's CBAM or ours, and a sum."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 16, 3, padding=1), attention

    def forward(self, images: Tensor) -> Tensor:
        return self.attention(self.stem(images)).sum((2, 3))


class TakesList(OneTensor):
    """As detectors: a list of images, and in training their targets."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        assert isinstance(images, list) and all(image.ndim == 3 for image in images)
        found = torch.cat([super(TakesList, self).forward(image[None]) for image in images])
        if not self.training:
            return [{"scores": each} for each in found]
        if targets is None:
            raise ValueError("in training there have to be targets")
        wanted = torch.stack([target["scores"] for target in targets])
        return {"loss": (found - wanted).square().mean()}


class TakesDict(OneTensor):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        assert isinstance(batch, dict)
        return super().forward(batch["image"]) * batch["scale"]


class TakesKeywords(OneTensor):
    def forward(self, *, image: Tensor, scale: Tensor) -> Tensor:
        return super().forward(image) * scale


class TakesTwo(OneTensor):
    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return super().forward(image) * scale


def image(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 8, 6)


def targets() -> list[dict[str, Tensor]]:
    return [{"scores": torch.rand(16)} for _ in range(2)]


def scale() -> Tensor:
    return torch.rand(2, 1) + 0.5


# Kinds of models, and inputs by the rule.
CASES: dict[str, tuple[type[OneTensor], Callable[[], Any]]] = {
    "tensor": (OneTensor, image),
    "tuple": (TakesTwo, lambda: (image(), scale())),
    "list": (TakesList, lambda: (list(image()), targets())),
    "list, by name": (TakesList, lambda: {"images": list(image()), "targets": targets()}),
    "dict": (TakesDict, lambda: ({"image": image(), "scale": scale()},)),
    "keywords": (TakesKeywords, lambda: {"image": image(), "scale": scale()}),
    "names of two": (TakesTwo, lambda: {"image": image(), "scale": scale()}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[type[OneTensor], Any]:
    make, inputs = CASES[request.param]
    return make, inputs()


def test_visualize(case: tuple[type[OneTensor], Any]) -> None:
    make, inputs = case
    model = make(cbam_ext.CBAM(16))
    maps = cbam_ext.visualize(model, inputs)
    pictures = next(t for t in as_call(inputs).tensors() if t.shape[-3] == 3)
    if pictures.ndim == 4:
        expected = model.attention.attention(model.stem(pictures))
        torch.testing.assert_close(tuple(maps["attention"]), tuple(expected))
    else:
        assert list(maps) == ["attention", "attention#2"]  # an image at a time
        expected = model.attention.attention(model.stem(pictures[None]))
        torch.testing.assert_close(tuple(maps["attention"]), tuple(expected))
    assert "of 2 images" in repr(maps)


def test_images_that_hide_in_a_list_of_dicts() -> None:
    class Detectron(TakesList):
        def forward(self, batch: list[dict[str, Any]]) -> Any:  # type: ignore[override]
            return [OneTensor.forward(self, each["image"][None]) for each in batch]

    batch = [{"height": 8, "image": each, "mask": torch.rand(5, 5)} for each in image()]
    maps = cbam_ext.visualize(Detectron(cbam_ext.CBAM(16)), batch)
    assert "of 2 images" in repr(maps)


def test_images_are_moved_and_cast_wherever_they_are(case: tuple[type[OneTensor], Any]) -> None:
    make, inputs = case
    model = make(cbam_ext.CBAM(16)).double()
    given = as_call(inputs)
    before = given.map(Tensor.clone)
    assert cbam_ext.visualize(model, inputs)["attention"].spatial_gate.dtype == torch.float64
    torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_measure_cost(case: tuple[type[OneTensor], Any]) -> None:
    make, inputs = case
    model = make(cbam_ext.CBAM(16))
    cost = cbam_ext.measure_cost(model, inputs, rounds=1)
    assert cost.flops >= 2 * 2 * 48 * 16 * 27 and cost.training_seconds is not None
    table = cbam_ext.compare_costs({"a": model, "b": model}, inputs, rounds=1)
    assert table.costs["a"].flops == table.costs["b"].flops == cost.flops


def test_several_inputs_are_the_positional_arguments() -> None:
    model, inputs = TakesTwo(cbam_ext.CBAM(16)), (image(), scale())
    one, several = (cbam_ext.measure_cost(model, *given, rounds=1) for given in ((inputs,), inputs))
    assert one.activation_bytes == several.activation_bytes


def test_inputs_with_a_gradient_count_wherever_they_are() -> None:
    """Found in lists and dicts too: their gradients are computed, and they are not kept memory."""
    for make, inputs in (
        (OneTensor, image().requires_grad_()),
        (TakesDict, ({"image": image().requires_grad_(), "scale": scale()},)),
    ):
        model = make(nn.Identity()).requires_grad_(False)
        assert cbam_ext.measure_cost(model, inputs, rounds=1).training_flops > 0  # type: ignore[operator]


def test_convert(case: tuple[type[OneTensor], Any]) -> None:
    make, inputs = case
    theirs = make(peers.LuuuyiWhole(16))
    ours, report = cbam_ext.convert(theirs.eval(), example_inputs=inputs, return_report=True)
    assert [done.name for done in report.converted] == ["attention"]
    call = as_call(inputs)
    torch.testing.assert_close(call.run(ours.eval()), call.run(theirs.eval()))


def test_convert_rewrites_with_inputs_by_name() -> None:
    """A sequence of gates is replaced where a run shows that it is called as a whole."""

    class Gates(OneTensor):
        def forward(self, *, image: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(image)

    theirs = Gates(nn.Sequential(peers.PeachyChannel(16, 4), peers.PeachySpatial()))
    _, report = cbam_ext.convert(theirs, example_inputs={"image": image()}, return_report=True)
    assert [done.name for done in report.converted] == ["attention.0"]


def test_a_forward_that_works_in_place_leaves_the_inputs() -> None:
    class InPlace(OneTensor):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.mul_(2))

    x = image()
    before = x.clone()
    cbam_ext.convert(InPlace(peers.LuuuyiWhole(16)), example_inputs=x)  # the runs agree
    assert torch.equal(x, before)


# ---------------------------------------------------------------------------------------- the rule


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_the_rule() -> None:
    a, b = torch.rand(1), torch.rand(2)
    assert as_call(a) == Call((a,), {})
    assert as_call((a, b)) == Call((a, b), {})
    assert as_call(()) == Call((), {})
    assert as_call({"x": a}) == as_call(OrderedDict(x=a)) == Call((), {"x": a})
    for one in ([a], [a, b], Pair(a, b), nn.utils.rnn.pack_sequence([a]), None, 3):
        call = as_call(one)
        assert call.args[0] is one and len(call.args) == 1 and not call.kwargs
    assert as_call(([a],)).args == ([a],)
    with pytest.raises(TypeError, match=r"has the key 3; for a model that takes this dict itself"):
        as_call({3: a})


def test_a_list_is_not_taken_for_arguments() -> None:
    """Never a guess: who means two arguments is told how to give them."""
    model, given = TakesTwo(cbam_ext.CBAM(16)), [image(), scale()]
    rule = r"TakesTwo cannot be called with these inputs, missing.*'scale': a tuple holds the pos"
    for run in (
        lambda: cbam_ext.visualize(model, given[:1]),
        lambda: cbam_ext.measure_cost(model, given, rounds=1),
        lambda: cbam_ext.compare_costs({"a": model}, given, rounds=1),
        lambda: cbam_ext.convert(TakesTwo(peers.LuuuyiWhole(16)), example_inputs=given),
    ):
        with pytest.raises(TypeError, match=rule):
            run()


def test_other_errors_of_a_model_stay_its_own() -> None:
    class Broken(OneTensor):
        def forward(self, images: Tensor) -> Tensor:
            raise TypeError("something further inside")

    with pytest.raises(TypeError, match="^something further inside$"):
        cbam_ext.measure_cost(Broken(cbam_ext.CBAM(16)), image(), rounds=1)


def test_images_of_several_sizes() -> None:
    """Gates are there; laid over the pictures they would lie."""
    pytest.importorskip("matplotlib")

    class Resizes(OneTensor):
        def forward(self, images: list[Tensor]) -> Tensor:  # type: ignore[override]
            sized = [nn.functional.interpolate(each[None], (8, 8)) for each in images]
            return super().forward(torch.cat(sized))

    model = Resizes(cbam_ext.CBAM(16))
    maps = cbam_ext.visualize(model, [torch.rand(3, 8, 8), torch.rand(3, 16, 6)])
    assert maps["attention"].spatial_gate.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="the images have several sizes.*one by one"):
        maps.overlays()
    maps.histograms()
    cbam_ext.visualize(model, [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]).overlays()


@pytest.mark.slow
def test_a_detector_of_torchvision() -> None:
    detection = pytest.importorskip("torchvision").models.detection
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    features = model.backbone.features[0]
    channels = features[-1][0].out_channels
    features.append(peers.LuuuyiWhole(channels))
    images = list(torch.rand(2, 3, 40, 60))
    boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0]])
    wanted = [{"boxes": boxes.clone(), "labels": torch.ones(1, dtype=torch.long)} for _ in images]
    model, report = cbam_ext.convert(model.eval(), example_inputs=images, return_report=True)
    (done,) = report.converted
    maps = cbam_ext.visualize(model, images)
    assert len(maps[done.name].spatial_gate) == 2
    cost = cbam_ext.measure_cost(model, images, wanted, rounds=1)
    assert cost.training_flops > cost.flops > 0  # type: ignore[operator]
