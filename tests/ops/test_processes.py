"""Calls from several threads and from worker processes, in inference mode, with hooks, and with
subclasses of Tensor: the same bits as from a plain call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

import cbam_ext
from cbam_ext import ops

from support.backends import Backend
from support.repeats import CASES, assert_same, everything
from support.samples import FEW, Arguments, draw, draw_like, same_bits

NORMS = [None, nn.BatchNorm2d, nn.Identity]

# The first backward of a process settles which threads autograd starts, and with a thread per
# device no forked child may differentiate. torch.export and torch.compile register a device even
# where there is none: the first backward has to come before the tests that call them.
torch.ones((), requires_grad=True).backward()


def training_step(module: nn.Module, x: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    """Output, gradients, and buffers after the step; leaves the module as it was."""
    module = copy.deepcopy(module)
    x = x.detach().requires_grad_()
    output = module(x)
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad(output, leaves, output if upstream is None else upstream)
    return [output.detach(), *gradients, *module.buffers()]


# ---------------------------------------------------------------------------------------- threads

THREADS = 8


def run_in_threads(jobs: Sequence[Callable[[], list[Tensor]]], rounds: int) -> None:
    """Every thread does every job, at first all the same at once, then each another one."""
    expected = [job() for job in jobs]
    together = threading.Barrier(THREADS)

    def work(worker: int) -> None:
        together.wait(timeout=60)
        for i in range(rounds):
            shift = 0 if i == 0 else worker
            for j in range(len(jobs)):
                which = (shift + j) % len(jobs)
                assert_same(expected[which], jobs[which](), f"thread {worker}, job {which}")

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, worker) for worker in range(THREADS)]:
            done.result()


def test_operator_in_threads(backend: Backend, generator: torch.Generator) -> None:
    def job(arguments: Arguments, upstream: Tensor) -> Callable[[], list[Tensor]]:
        return lambda: everything(backend, arguments, upstream)

    problems, rounds = (CASES[5:6], 1) if backend.emulated else (CASES[:6], 3)
    drawn = [draw(problem, generator, backend.device) for problem in problems]
    jobs = [job(arguments, draw_like(arguments.input, generator)) for arguments in drawn]
    run_in_threads(jobs, rounds)


@pytest.mark.on("cpu", "cuda")
def test_modules_in_threads(backend: Backend, generator: torch.Generator) -> None:
    jobs: list[Callable[[], list[Tensor]]] = []
    for norm_layer in NORMS:
        for shape in ((3, 33, 40, 41), (1, 33, 47, 61)):
            x = torch.randn(shape, generator=generator).to(backend.device)
            module = cbam_ext.CBAM(33, norm_layer=norm_layer, device=backend.device)
            frozen = copy.deepcopy(module).eval()
            jobs += [
                lambda module=module, x=x: training_step(module, x),
                lambda module=frozen, x=x: training_step(module, x),
                lambda module=frozen, x=x: list(module.attention(x)),
            ]
    run_in_threads(jobs, 2)


# -------------------------------------------------------------------------------------- processes

# A child made by fork has none of its parent's threads. GNU's OpenMP, behind torch's parallel work
# on Linux, does not know: where the parent has shared out work before, it waits forever for threads
# to share the child's work with. That holds for torch's own operators and for ours alike. So such a
# child has to use one thread, as DataLoader arranges for its workers; maps too small to be shared
# out do not mind.


class Samples(Dataset):
    """Training steps, made where the sample is asked for."""

    def __init__(self, modules: Sequence[nn.Module], inputs: Tensor) -> None:
        self.modules, self.inputs = modules, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> list[Tensor]:
        steps = [training_step(module, self.inputs[i : i + 1]) for module in self.modules]
        return [self.inputs[i], *(t for step in steps for t in step)]


class Batches:
    """Puts samples together and runs the modules on the batch."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules

    def __call__(self, samples: list[list[Tensor]]) -> list[Tensor]:
        batch = torch.stack([sample[0] for sample in samples])
        steps = [training_step(module, batch) for module in self.modules]
        return [t for results in (*samples, *steps) for t in results]


@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize(
    "method",
    ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))],
)
def test_data_loader_workers(method: str, generator: torch.Generator) -> None:
    modules = [cbam_ext.CBAM(16, norm_layer=norm_layer) for norm_layer in NORMS[:2]]
    samples = Samples(modules, torch.randn(4, 16, 64, 48, generator=generator))
    options: dict[str, Any] = {"batch_size": 2, "collate_fn": Batches(modules)}
    torch.set_num_threads(4)
    expected = list(DataLoader(samples, **options))
    context = torch.multiprocessing.get_context(method)
    context.set_forkserver_preload(["torch", "cbam_ext"])  # once, and not in each worker
    found = list(
        DataLoader(samples, num_workers=2, multiprocessing_context=context, timeout=200, **options)
    )
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b, method)


@pytest.mark.usefixtures("thread_count")
@pytest.mark.parametrize(
    ("shape", "threads"),
    [((8, 64, 56, 56), 1), ((2, 64, 7, 5), None)],
    ids=["one thread", "small"],
)
# No BatchNorm: torch shares out even the smallest.
@pytest.mark.parametrize("norm_layer", [None, nn.Identity])
def test_fork_after_parallel_work(
    norm_layer: type[nn.Module] | None,
    shape: tuple[int, ...],
    threads: int | None,
    generator: torch.Generator,
    tmp_path: Path,
) -> None:
    module = cbam_ext.CBAM(64, norm_layer=norm_layer)
    x = torch.randn(shape, generator=generator)
    torch.set_num_threads(4)
    module(torch.zeros(8, 64, 56, 56)).sum().backward()  # has all four at work
    expected = training_step(module, x)

    def child() -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        torch.save(training_step(module, x), tmp_path / "found.pt")

    process = torch.multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=60)
    if process.is_alive():
        process.kill()
        pytest.fail("the child hangs")
    assert process.exitcode == 0
    assert_same(expected, torch.load(tmp_path / "found.pt"), "child")


# --------------------------------------------------------------------------------- inference mode


def test_operator_in_inference_mode(backend: Backend, generator: torch.Generator) -> None:
    arguments = draw(FEW[1], generator, backend.device)
    arguments.conv_weight.requires_grad_()
    expected = [backend.ops.forward(*arguments).detach(), *backend.ops.gates(*arguments)]
    with torch.inference_mode():
        made_inside = Arguments(*(None if t is None else t.clone() for t in arguments))
        for given in (arguments, made_inside):
            found = [backend.ops.forward(*given), *backend.ops.gates(*given)]
            found.append(ops.cbam(*given, namespace=backend.namespace))
            assert all(t.is_inference() and not t.requires_grad for t in found)
            assert_same([*expected, expected[0]], found, "in inference mode")


@pytest.mark.parametrize("norm_layer", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_module_in_inference_mode(
    norm_layer: type[nn.Module] | None, training: bool, generator: torch.Generator
) -> None:
    module = cbam_ext.CBAM(6, norm_layer=norm_layer).train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(2, 6, 5, 4, generator=generator)
    with torch.no_grad():
        expected = [twin(x), *twin.buffers(), *twin.attention(x)]
    with torch.inference_mode():
        output = module(x.clone())
        assert output.is_inference()
        assert_same(expected, [output, *module.buffers(), *module.attention(x)], "module")


@pytest.mark.parametrize("norm_layer", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_tensors_of_inference_mode_outside_of_it(
    norm_layer: type[nn.Module] | None, training: bool, generator: torch.Generator
) -> None:
    """As in torch's functions: they compute, but autograd may not keep them."""
    module = cbam_ext.CBAM(6, norm_layer=norm_layer).train(training)
    plain = torch.randn(2, 6, 5, 4, generator=generator)
    with torch.inference_mode():
        x = plain.clone()
    with torch.no_grad():
        output = module(x)
        assert not output.is_inference()
        assert_same([module(plain), *module.attention(plain)], [output, *module.attention(x)], "")
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x)
    assert_same(training_step(module, plain), training_step(module, x.clone()), "clone")


def assert_all_close(expected: Sequence[Tensor], found: Sequence[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.allclose(b, a, rtol=1e-4, atol=1e-5), f"{what}: result {i}"


# ------------------------------------------------------------------------------------------ hooks

# Those of the module itself and of a norm that trains. What hooks of other layers see is in
# test_layers.py.


class Case:
    """A module, its input, and what comes out of a step without hooks."""

    def __init__(self, norm_layer: Any, training: bool, generator: torch.Generator) -> None:
        self.module = cbam_ext.CBAM(6, norm_layer=norm_layer).train(training)
        self.x = torch.randn(2, 6, 5, 4, generator=generator, requires_grad=True)
        self.upstream = torch.randn(2, 6, 5, 4, generator=generator)
        with torch.no_grad():  # no gradient may vanish: one hidden unit, which has to fire
            self.module.channel.fc1.weight.abs_()
            self.x += 1

    def expected(self, x: Tensor | None = None, upstream: Tensor | None = None) -> list[Tensor]:
        """Output, gradient of the input, gradients of the parameters."""
        x = self.x if x is None else x
        step = training_step(self.module, x, self.upstream if upstream is None else upstream)
        gradients = len(list(self.module.parameters()))
        return step[: 2 + gradients]

    def found(self, output: Tensor) -> list[Tensor]:
        assert self.x.grad is not None
        return [output.detach(), self.x.grad, *(p.grad for p in self.module.parameters())]


@pytest.fixture(
    params=[(None, True), (nn.BatchNorm2d, True), (nn.BatchNorm2d, False)],
    ids=["no norm", "norm", "folded norm"],
)
def case(request: pytest.FixtureRequest, generator: torch.Generator) -> Case:
    return Case(*request.param, generator)


def test_forward_hooks(case: Case) -> None:
    """They see input and output, and may replace both."""
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0])
        return (args[0] * 2,)

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen.extend([args[0], output])
        return output * 4

    output, gradient, *parameters = case.expected(case.x * 2, case.upstream * 4)
    case.module.register_forward_pre_hook(before)
    case.module.register_forward_hook(after)
    result = nn.Sequential(case.module)(case.x)
    result.backward(case.upstream)
    assert_same([case.x, case.x * 2, output], seen, "seen")
    assert_same([output * 4, gradient * 2, *parameters], case.found(result), "step")


def test_full_backward_hooks(case: Case) -> None:
    """On the module and on the one around it: they see gradients, and may replace them."""
    seen: list[Tensor] = []

    def before(module: nn.Module, grad_output: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(grad_output[0])
        return (grad_output[0] * 2,)

    def after(
        module: nn.Module, grad_input: tuple[Tensor], grad_output: tuple[Tensor]
    ) -> tuple[Tensor]:
        seen.extend([*grad_input, *grad_output])
        return (grad_input[0] * 8,)

    once, twice = case.upstream * 2, case.upstream * 4
    output, gradient, *parameters = case.expected(upstream=twice)
    around = nn.Sequential(case.module)
    for module in (around, case.module):
        module.register_full_backward_pre_hook(before)
        module.register_full_backward_hook(after)
    result = around(case.x)
    result.backward(case.upstream)
    expected = [case.upstream, once, gradient, twice, gradient * 8, once]
    assert_same(expected, seen, "seen")
    assert_same([output, gradient * 64, *parameters], case.found(result), "step")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_full_backward_hooks_without_a_gradient_of_the_input(case: Case) -> None:
    seen: list[Any] = []
    output, _, *parameters = case.expected()
    case.module.register_full_backward_hook(lambda _, *gradients: seen.append(gradients))
    result = case.module(case.x.detach())
    result.backward(case.upstream)
    (((nothing,), (upstream,)),) = seen
    assert nothing is None
    assert same_bits(upstream, case.upstream)
    assert_same([output, *parameters], [result, *(p.grad for p in case.module.parameters())], "")


def test_hooks_on_tensors(case: Case) -> None:
    """Of the input, the output, its node in the graph, and the parameters."""
    seen: dict[str, Tensor] = {}
    output, gradient, *parameters = case.expected(upstream=case.upstream * 2)
    expected = {"input": gradient, "output": case.upstream, "node": case.upstream * 2}

    def note(name: str, factor: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            seen[name] = gradient
            return gradient * factor

        return hook

    def note_in_node(gradients: tuple[Tensor]) -> None:
        seen["node"] = gradients[0]

    def note_accumulated(name: str) -> Callable[[Tensor], None]:
        """As optimizers do that step within backward: they drop the gradient."""

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            seen[f"{name}, accumulated"], parameter.grad = parameter.grad, None

        return hook

    case.x.register_hook(note("input", 1))
    for (name, parameter), grad in zip(case.module.named_parameters(), parameters, strict=True):
        parameter.register_hook(note(name, 4))
        parameter.register_post_accumulate_grad_hook(note_accumulated(name))
        expected |= {name: grad, f"{name}, accumulated": grad * 4}
    result = case.module(case.x)
    result.register_hook(note("output", 2))
    assert result.grad_fn is not None
    result.grad_fn.register_prehook(note_in_node)
    result.backward(case.upstream)
    assert seen.keys() == expected.keys()
    assert all(parameter.grad is None for parameter in case.module.parameters())
    assert same_bits(result, output)
    for name, value in expected.items():
        assert same_bits(seen[name], value), name


def test_hooks_on_a_norm_that_trains(generator: torch.Generator) -> None:
    case = Case(nn.BatchNorm2d, True, generator)
    norm = case.module.spatial.norm
    seen: list[Tensor] = []
    expected = case.expected()
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    norm.register_forward_hook(lambda _, args, logits: seen.append(logits))
    norm.register_full_backward_hook(lambda _, inner, outer: seen.extend([*inner, *outer]))
    result = case.module(case.x)
    result.backward(case.upstream)
    assert [t.shape for t in seen] == [(2, 1, 5, 4)] * 4
    assert_same(expected, case.found(result), "step")
    parameters = case.module._read_layers()
    _, logits, _ = cbam_ext.ops.spatial_logits(case.x, *parameters)
    assert_same([logits, copy.deepcopy(norm)(logits)], seen[:2], "logits")
    # A shift of all logits is what the norm's bias adds.
    torch.testing.assert_close(seen[3].sum(), expected[-1].sum(), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- subclasses of Tensor


class Marked(Tensor):
    """A subclass as users make them: torch's functions hand it on."""


class Wrapped(Tensor):
    """A subclass that holds a tensor and notes the operators that reach it."""

    seen: list[str] = []  # noqa: RUF012
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        self = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )
        self.held = held.detach()
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace.startswith("cbam"):
            cls.seen.append(func._opname)
        inner = tree_map_only(Wrapped, lambda t: t.held, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*inner[0], **inner[1]))


def bare(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.held if isinstance(tensor, Wrapped) else tensor.as_subclass(Tensor)


SUBCLASSES: dict[type[Tensor], Callable[[Tensor], Tensor]] = {
    Marked: lambda t: t.detach().clone().as_subclass(Marked),
    Wrapped: lambda t: Wrapped(t.detach().clone()),
}
SUBCLASS = pytest.mark.parametrize("kind", SUBCLASSES)


@SUBCLASS
@pytest.mark.parametrize("place", range(7))
def test_operator_on_a_subclass(
    backend: Backend, kind: type[Tensor], place: int, generator: torch.Generator
) -> None:
    arguments = draw(FEW[1], generator, backend.device)
    upstream = draw_like(arguments.input, generator)
    expected = everything(backend, arguments, upstream)

    given = [t.detach() for t in arguments]
    given[place] = SUBCLASSES[kind](given[place])
    leaves = [t.requires_grad_() for t in given]
    Wrapped.seen.clear()
    output = backend.ops.forward(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream)
    seen = list(Wrapped.seen)
    gates = backend.ops.gates(*given)
    assert all(type(t) is kind for t in (output, *gates))
    assert_same(expected, [bare(t) for t in (output, *gates, *gradients)], f"place {place}")
    if kind is Wrapped:
        assert seen == ["_forward_train", "_backward"]
        assert all(type(t) is Wrapped for t in gradients)
    with torch.no_grad():
        output = backend.ops.forward(*given)
    assert type(output) is kind
    assert same_bits(bare(output), expected[0])


@SUBCLASS
@pytest.mark.parametrize("place", ["input", "channel.fc1", "spatial.conv"])
def test_module_on_a_subclass(kind: type[Tensor], place: str, case: Case) -> None:
    expected, gates = case.expected(), case.module.attention(case.x)
    x = case.x
    # What has a dispatch of its own might compute something else: then the layer is called.
    compare = assert_same if place == "input" or kind is Marked else assert_all_close
    if place == "input":
        x = SUBCLASSES[kind](x).requires_grad_()
    else:
        layer = case.module.get_submodule(place)
        layer.weight = nn.Parameter(SUBCLASSES[kind](layer.weight))
        assert isinstance(layer.weight, nn.Parameter) and type(layer.weight) is kind
    of_kind = [type(gate) is kind for gate in case.module.attention(x)]
    assert all(of_kind) if compare is assert_same else any(of_kind)
    compare(list(gates), [bare(gate) for gate in case.module.attention(x)], "gates")
    output = case.module(x)
    assert type(output) is kind
    output.backward(case.upstream)
    assert x.grad is not None
    found = [output, x.grad, *(p.grad for p in case.module.parameters())]
    compare(expected, [bare(t) for t in found], "step")


@SUBCLASS
def test_double_backward_on_a_subclass(kind: type[Tensor], generator: torch.Generator) -> None:
    module = cbam_ext.CBAM(5, hidden_channels=2, kernel_size=3)

    def penalty(x: Tensor) -> Tensor:
        x.requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    x = torch.randn(2, 5, 4, 3, generator=generator)
    assert same_bits(penalty(x.clone()), bare(penalty(SUBCLASSES[kind](x))))
