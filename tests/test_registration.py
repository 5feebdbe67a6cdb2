"""What the operators tell PyTorch about themselves: opcheck, fake kernels, compile, export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import Backend
from samples import (
    FEW,
    Arguments,
    Problem,
    assert_close,
    assert_gradients_close,
    draw,
    draw_like,
    same_bits,
    truth,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import cbam_ext

FIRST = ("forward", "gates", "_forward_train", "_logits")
NAMES = (*FIRST, "_backward", "_apply", "_apply_backward", "_logits_backward")


def calls(
    backend: Backend, arguments: Arguments, generator: torch.Generator
) -> dict[str, tuple[Any, ...]]:
    """Valid arguments of every operator; those of later ones come from the earlier ones."""
    x, *parameters = arguments
    g = draw_like(x, generator)
    channel_gate, spatial_gate = backend.ops.gates(*arguments)
    _, logits = backend.ops._logits(*arguments)
    gate_gradient = draw_like(channel_gate, generator)
    logit_gradient = draw_like(logits, generator)
    flags = (True, True, True)
    return {
        **{name: tuple(arguments) for name in FIRST},
        "_backward": (g, x, channel_gate, spatial_gate, *parameters, *flags),
        "_apply": (x, channel_gate, logits),
        "_apply_backward": (g, x, channel_gate, logits),
        "_logits_backward": (
            *(g, x, channel_gate, spatial_gate, gate_gradient, logit_gradient),
            *parameters,
            *flags,
        ),
    }


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


@pytest.mark.parametrize("problem", FEW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend: Backend, name: str, problem: Problem, generator: torch.Generator) -> None:
    arguments = draw(problem, generator, backend.device)
    call = calls(backend, arguments, generator)[name]
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
    for name, call in calls(backend, arguments, generator).items():
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


# ------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("problem", FEW[:2], ids=str)
def test_compile_keeps_the_operator_whole(
    backend: Backend, problem: Problem, generator: torch.Generator
) -> None:
    arguments = draw(problem, generator, backend.device)
    grad_output = draw_like(arguments.input, generator)
    leaves = [None if t is None else t.requires_grad_() for t in arguments]
    present = [t for t in leaves if t is not None]
    torch._dynamo.reset()
    compiled = torch.compile(backend.ops.forward, fullgraph=True, backend="aot_eager")
    output = compiled(*leaves)
    assert output.stride() == arguments.input.stride()
    assert same_bits(output.detach(), backend.ops.forward(*leaves).detach())
    found = iter(torch.autograd.grad(output, present, grad_output))
    gradients = [None if t is None else next(found) for t in leaves]
    assert_gradients_close(gradients, arguments, grad_output)


def test_compile_with_dynamic_shapes(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, size in ((2, 5), (3, 5), (2, 9), (1, 4)):
        x = torch.randn(n, 6, size, size + 1, generator=generator, requires_grad=True)
        output = compiled(x)
        torch.testing.assert_close(output, module(x))
        output.square().sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize(
    ("norm_layer", "compiler"), [(None, "inductor"), (nn.BatchNorm2d, "aot_eager")]
)
def test_compile_between_other_layers(
    norm_layer: type[nn.Module] | None, compiler: str, generator: torch.Generator
) -> None:
    """As users do: inductor fuses the neighbours and calls the operator as it is."""
    torch._dynamo.reset()
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), cbam_ext.CBAM(6, norm_layer=norm_layer), nn.ReLU()
    )
    x = torch.randn(2, 3, 9, 8, generator=generator)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize("strict", [False, True])
def test_export_has_one_node(strict: bool, generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6, mlp_bias=True).eval()
    x = torch.randn(2, 6, 5, 7, generator=generator)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
    for exported in (program, program.run_decompositions()):
        targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
        assert targets == ["cbam.forward.default"]
    wider = torch.cat([x, x + 1])
    assert torch.equal(program.module()(wider), module(wider))


def test_export_folds_a_norm_that_does_not_train(generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(6, norm_layer=nn.BatchNorm2d).eval()
    x = torch.randn(2, 6, 5, 7, generator=generator)
    program = torch.export.export(module, (x,))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("cbam.forward.default") == 1
    assert not any("batch_norm" in target or "cbam._" in target for target in targets)
    torch.testing.assert_close(program.module()(x), module(x))


def test_make_fx_traces_the_operator(backend: Backend, generator: torch.Generator) -> None:
    arguments = draw(FEW[0], generator, backend.device)
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x: backend.ops.forward(x, *arguments[1:])
    )(arguments.input)
    assert_close(graph(arguments.input), truth(arguments).output, "output")
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert targets == [f"{backend.namespace}.forward.default"]
