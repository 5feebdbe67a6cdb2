"""What the operators tell PyTorch about themselves: opcheck, fake kernels, FLOPs, names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cbam_ext
from cbam_ext import reference

from support.backends import Backend
from support.operators import NAMES, calls
from support.samples import (
    FEW,
    Problem,
    assert_close,
    draw,
    truth,
)


def test_every_operator_is_covered(backend: Backend) -> None:
    found = {name for name, schema in _schemas(backend.namespace).items() if "Tensor" in schema}
    # Diagnostics: a tensor that says which device, and a vector of numbers for host code.
    assert found - {"_cuda_arch", "_launch_plan"} == set(NAMES)


def test_every_backend_has_the_same_operators(backend: Backend) -> None:
    schemas, those_of_cbam = _schemas(backend.namespace), _schemas("cbam")
    for name in NAMES:
        assert schemas[name] == those_of_cbam[name]


def _schemas(namespace: str) -> dict[str, str]:
    """Arguments and results of all operators, by name."""
    prefix = f"{namespace}::"
    schemas = (str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith(prefix))
    pairs = (schema.removeprefix(prefix).partition("(") for schema in schemas)
    return {name: rest for name, _, rest in pairs}


def test_opcheck_of_the_diagnostics() -> None:
    opcheck(torch.ops.cbam._cpu_isa.default, ())
    opcheck(torch.ops.cbam._use_cpu_isa.default, (torch.ops.cbam._cpu_isa(),))


@pytest.mark.parametrize("problem", FEW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend: Backend, name: str, problem: Problem, generator: torch.Generator) -> None:
    arguments = draw(problem, generator, backend.device)
    call = calls(backend.ops, arguments, generator)[name]
    if name in ("forward", "_forward_train"):
        call = tuple(None if t is None else t.requires_grad_() for t in call)
    # A half gradient is compared with itself, but by way of float sums in another order.
    opcheck(getattr(backend.ops, name).default, call, atol=1e-2, rtol=1e-2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 1, 5, 7), (3, 6, 1, 1), (0, 6, 5, 7)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_results_look_like_real_ones(
    backend: Backend,
    shape: tuple[int, int, int, int],
    layout: str,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """For all operators: shapes, strides, dtypes, devices, and which gradients are left out."""
    problem = Problem(shape, 3, 2, dtype, parameters="accumulator", biases="1c")
    arguments = draw(problem, generator, backend.device)
    arguments = arguments._replace(
        input=LAYOUTS[layout](arguments.input),
        conv_weight=arguments.conv_weight.contiguous(memory_format=torch.channels_last),
        fc2_weight=arguments.fc2_weight.T.contiguous().T,
    )
    for name, call in calls(backend.ops, arguments, generator).items():
        variants = [call]
        if call[-1] is True:
            variants += [(*call[:-3], *flags) for flags in FLAGS]
        for variant in variants:
            operator = getattr(backend.ops, name)
            with FakeTensorMode() as mode:
                fake = operator(
                    *(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in variant)
                )
            real = operator(*variant)
            pairs = zip(_tuple(fake), _tuple(real), strict=True)
            for i, (a, b) in enumerate(pairs):
                assert _looks(a) == _looks(b), f"{name}, result {i}, {variant[-3:]}"


FLAGS = [(True, False, False), (False, True, False), (False, False, True)]


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _looks(t: Tensor) -> tuple[object, ...]:
    return t.shape, t.stride(), t.dtype, t.device


class _Namespaces(TorchDispatchMode):
    """Notes whose operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_gradients_come_from_the_same_backend(backend: Backend, generator: torch.Generator) -> None:
    """Otherwise one backend would be tested with the kernels of another."""
    arguments = [t.requires_grad_() for t in draw(FEW[1], generator, backend.device)]
    x, namespace = arguments[0], backend.namespace
    with _Namespaces() as namespaces:
        backend.ops.forward(*arguments).sum().backward()
        backend.ops._forward_train(*arguments)[0].sum().backward()
        cbam_ext.ops.cbam(*arguments, namespace=namespace).sum().backward()
        torch.func.grad(lambda x: cbam_ext.ops.cbam(x, *arguments[1:], namespace=namespace).sum())(
            x
        )
        gate, logits, carriers = cbam_ext.ops.spatial_logits(*arguments, namespace=namespace)
        output = cbam_ext.ops.apply_gates(x, gate, logits, carriers, namespace=namespace)
        output.sum().backward()
    assert namespaces.seen == {"aten", namespace}


def test_make_fx_traces_the_operator(backend: Backend, generator: torch.Generator) -> None:
    arguments = draw(FEW[0], generator, backend.device)
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x: backend.ops.forward(x, *arguments[1:])
    )(arguments.input)
    assert_close(graph(arguments.input), truth(arguments).output, "output")
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert targets == [f"{backend.namespace}.forward.default"]


# ----------------------------------------------------------------------- counting and profiling


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
def test_flops_are_those_of_plain_pytorch(
    backend: Backend, wanted: tuple[bool, bool, bool], generator: torch.Generator
) -> None:
    """By which gradients are wanted: of the input, of the MLP, of the convolution."""
    problem = Problem((2, 6, 5, 7), 5, 3, biases="12c")
    arguments = draw(problem, generator, backend.device)
    each = (wanted[0], *[wanted[1]] * 4, *[wanted[2]] * 2)

    def count(function: Callable[..., Tensor]) -> int:
        leaves = [t.clone().requires_grad_(w) for t, w in zip(arguments, each, strict=True)]
        with FlopCounterMode(display=False) as counter:
            output = function(*leaves)
            if any(wanted):
                output.sum().backward()
        return counter.get_total_flops()

    assert count(backend.ops.forward) == count(reference.cbam) > 0


def test_flops_of_modules() -> None:
    """Whatever way a module takes, and by module."""
    x = torch.randn(2, 6, 5, 7)
    layers = 2 * 2 * 2 * (6 * 2 + 2 * 6)
    convolution = 2 * 2 * 5 * 7 * 2 * 7 * 7
    for norm_layer in (None, nn.BatchNorm2d):
        model = nn.Sequential(cbam_ext.CBAM(6, hidden_channels=2, norm_layer=norm_layer))
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        # The input wants no gradient: the last product of the MLP's backward is left out.
        assert counter.get_total_flops() == layers + 1.5 * layers + 3 * convolution
        assert "Sequential.0" in counter.get_flop_counts()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(x)
            model[0].attention(x)
        assert counter.get_total_flops() == 2 * (layers + convolution)


@pytest.mark.parametrize(
    ("norm_layer", "names"),
    [
        (None, {"cbam::_forward_train", "cbam::_backward"}),
        (nn.BatchNorm2d, {"cbam::_logits", "cbam::_apply"}),
    ],
)
def test_profiler_shows_the_operators(
    norm_layer: type[nn.Module] | None, names: set[str], generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(6, norm_layer=norm_layer)
    x = torch.randn(2, 6, 5, 7, generator=generator, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x).sum().backward()
    assert names <= {event.key for event in profile.key_averages()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.no_grad():
            module.eval()(x)
        module.attention(x)
    shown = {event.key for event in profile.key_averages()}
    assert {"cbam::forward", "cbam::gates"} <= shown
