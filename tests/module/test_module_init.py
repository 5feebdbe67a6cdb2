"""How the gates of a new module begin: ``init``."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import cbam_ext

OPEN = {"identity": 5.0, 0.5: 0.0, 0.88: 1.9924301646902063, 0.3: -0.8472978603872036}


def affine_instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


NORMS = {"no norm": None, "batch norm": nn.BatchNorm2d, "instance norm": affine_instance_norm}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", OPEN, ids=str)
def test_both_gates_begin_open(init: str | float, norm: str, generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(24, init=init, norm_layer=NORMS[norm], dtype=torch.float64)
    x = torch.randn(2, 24, 6, 5, generator=generator, dtype=torch.float64)
    gate = torch.tensor(OPEN[init], dtype=torch.float64).sigmoid()
    for training in (True, False):
        for found in module.train(training).attention(x):
            torch.testing.assert_close(found, gate.expand_as(found), rtol=1e-12, atol=0)
        torch.testing.assert_close(module(x), gate.square() * x, rtol=1e-12, atol=0)
    assert module.why_not_fused() == cbam_ext.CBAM(24, norm_layer=NORMS[norm]).why_not_fused()


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_the_paper_s_module_unless_asked(norm: str) -> None:
    """Nothing else is drawn, kept or named differently; biases are there where they are needed."""
    options = {"norm_layer": NORMS[norm]}
    torch.manual_seed(5)
    plain = cbam_ext.CBAM(24, **options)
    torch.manual_seed(5)
    same = cbam_ext.CBAM(24, init="default", **options)
    assert plain.channel.fc1.bias is plain.channel.fc2.bias is plain.spatial.conv.bias is None
    assert str(same) == str(plain)
    for ours, theirs in zip(same.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    built = {"mlp_bias": True, "conv_bias": norm == "no norm", **options}
    torch.manual_seed(5)
    wanted = cbam_ext.CBAM(24, **built)
    torch.manual_seed(5)
    opened = cbam_ext.CBAM(24, init="identity", **options)
    assert opened.state_dict().keys() == wanted.state_dict().keys()
    assert vars(opened).keys() == vars(wanted).keys() and str(opened) == str(wanted)
    assert torch.equal(opened.channel.fc1.weight, wanted.channel.fc1.weight)
    assert torch.equal(opened.channel.fc1.bias, wanted.channel.fc1.bias)
    if norm != "no norm":
        assert torch.equal(opened.spatial.conv.weight, wanted.spatial.conv.weight)
    # So that one loads what the other has learnt.
    buffer = io.BytesIO()
    torch.save(wanted.state_dict(), buffer)
    buffer.seek(0)
    opened.load_state_dict(torch.load(buffer))
    x = torch.randn(2, 24, 6, 5)
    assert torch.equal(copy.deepcopy(opened).eval()(x), wanted.eval()(x))


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d], ids=["no norm", "batch norm"])
def test_everything_learns_from_the_second_step_on(norm: type[nn.Module] | None) -> None:
    module = cbam_ext.CBAM(16, reduction=4, init="identity", norm_layer=norm, dtype=torch.float64)
    nn.init.constant_(module.channel.fc1.bias, 0.5)  # no hidden unit is dead
    nn.init.uniform_(module.channel.fc1.weight)
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    upstream = torch.randn_like(x)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    waiting = {"channel.fc1.weight", "channel.fc1.bias"}
    if norm is not None:
        waiting.add("spatial.conv.weight")
    for step in range(2):
        optimizer.zero_grad()
        module(x).backward(upstream)
        still = {n for n, p in module.named_parameters() if not p.grad.any()}
        assert still == (waiting if step == 0 else set())
        optimizer.step()


def gates_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.attention(torch.rand(1, 16, 4, 4))


def test_a_part_of_the_biases_may_be_named() -> None:
    module = cbam_ext.CBAM(16, init="identity", conv_bias=True)
    assert all(bool((gate > 0.99).all()) for gate in gates_of(module))
    # The norm has a bias of its own, so the convolution's is free.
    for bias in (True, False, None):
        module = cbam_ext.CBAM(16, init="identity", norm_layer=nn.BatchNorm2d, conv_bias=bias)
        assert (module.spatial.conv.bias is None) is (not bias)
        assert all(bool((gate > 0.99).all()) for gate in gates_of(module.eval()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zero"}, "'default' or 'identity', or a number between 0 and 1, got 'zero'"),
        ({"init": None}, "got None"),
        ({"init": True}, "got True"),
        ({"init": 1.0}, "got 1.0"),
        ({"init": 0}, "got 0"),
        ({"init": float("nan")}, "got nan"),
        ({"init": "identity", "mlp_bias": False}, "leave out mlp_bias=False or use init='default'"),
        ({"init": 0.9, "conv_bias": False}, "init=0.9 opens .* leave out conv_bias=False"),
        ({"init": "identity", "norm_layer": nn.InstanceNorm2d}, "InstanceNorm2d does not have"),
    ],
    ids=str,
)
def test_what_cannot_be_opened_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cbam_ext.CBAM(16, **options)


def test_on_the_meta_device_and_in_half() -> None:
    assert cbam_ext.CBAM(16, init="identity", device="meta").channel.fc2.bias.is_meta
    module = cbam_ext.CBAM(16, init="identity", dtype=torch.bfloat16)
    assert module.channel.fc2.bias.unique().tolist() == [2.5]
    assert module.spatial.conv.bias.tolist() == [5.0]
