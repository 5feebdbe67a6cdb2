"""add_cbam(..., "residual"): which blocks add their input, and where their branch ends."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cbam_ext import add_cbam, remove_cbam

from support.placements import ResidualBlock, add, cbams, image, make_gates_tell


class Sum(nn.Module):
    """Whatever is added."""

    def __init__(self, add: Callable[[Sum, Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.add = add
        for name in ("a", "b", "c"):
            self.add_module(name, nn.Conv2d(channels, channels, 3, padding=1))
        self.seq = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sequential(nn.ReLU()))
        self.drop, self.gate = nn.Dropout(), nn.Sigmoid()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self, x)


def _through(m: Sum, x: Tensor) -> Tensor:
    y = x + m.a(x)
    return y + m.b(y)


SUMS: dict[str, tuple[Callable[[Sum, Tensor], Tensor], list[str]]] = {
    "its input": (lambda m, x: m.b(m.a(x)) + x, ["b"]),
    "in place": (lambda m, x: m.a(x).add_(x), ["a"]),
    "the other way round": (lambda m, x: x + m.a(x), ["a"]),
    "a shortcut": (lambda m, x: m.c(x) + m.b(m.a(x)), ["b"]),
    "a shortcut of few steps": (lambda m, x: m.a(x) + m.seq(x), ["seq.1.0"]),
    "two in turn": (_through, ["a", "b"]),
    "a Sequential": (lambda m, x: x + m.seq(x), ["seq.1.0"]),
    "dropout": (lambda m, x: x + m.drop(m.a(x)), ["a"]),
    "a product, then dropout": (lambda m, x: x + m.drop(m.a(x) * 0.5), ["drop"]),
}


@pytest.mark.parametrize("name", SUMS)
def test_blocks_that_add_their_input(name: str) -> None:
    add_, expected = SUMS[name]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Sum(add_)).double().eval()
    assert add(model, "residual") == [f"1.{name}" for name in expected]
    if expected == ["drop"]:  # before it, so that a branch is dropped as a whole
        model.train()
        make_gates_tell(model)
        plain = remove_cbam(copy.deepcopy(model))
        x, block, reference = image().double(), model[1], plain[1]
        y = plain[0](x)
        torch.manual_seed(0)
        expected_output = y + block.drop.forward(block.drop.cbam(reference.a(y) * 0.5))
        torch.manual_seed(0)
        torch.testing.assert_close(model(x), expected_output)


NO_SUMS: dict[str, Callable[[Sum, Tensor], Tensor]] = {
    "a gate": lambda m, x: x + x * m.gate(x),
    "two branches": lambda m, x: m.a(x) + m.b(x),
    "a number": lambda m, x: m.a(x) + 1,
    "a vector": lambda m, x: m.a(x) + m.b.bias[:, None, None],
    "tokens": lambda m, x: (x.flatten(2).mT + m.linear(x.flatten(2).mT)).mT.unflatten(2, (12, 12)),
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_what_is_no_residual_block(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Sum(NO_SUMS[name]))
    with pytest.raises(ValueError, match="no block of feature maps adds its input"):
        add_cbam(model, "residual", example_inputs=image())


def test_skip_connections_are_none() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return self.conv(x) + skip

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.decoder = nn.Conv2d(3, 4, 1), ResidualBlock(4), Decoder()

        def forward(self, x: Tensor) -> Tensor:
            skip = self.a(x)
            return self.decoder(self.b(skip), skip)

    assert add(UNet(), "residual") == ["b.bn2"]


def test_a_branch_without_an_end_is_told_of() -> None:
    nowhere = Sum(lambda m, x: x + torch.relu(m.a(x)))
    with pytest.raises(ValueError, match="add their input, '1', no module that is run once ends"):
        add_cbam(nn.Sequential(nn.Conv2d(3, 4, 1), nowhere), "residual")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nowhere, ResidualBlock(4))
    with pytest.warns(UserWarning, match="no CBAM in '1', which add their input") as caught:
        add_cbam(model, "residual")
    assert caught[0].filename == __file__
    assert list(cbams(model)) == ["2.bn2.cbam"]


def test_a_model_that_adds_the_image() -> None:
    class Denoiser(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x)

    layers = nn.Conv2d(3, 4, 1), ResidualBlock(4), nn.Conv2d(4, 3, 1)
    assert add(Denoiser(*layers), "residual") == ["layers.1.bn2"]
    assert add(Denoiser(nn.Conv2d(3, 3, 1)), "residual") == ["layers.0"]
