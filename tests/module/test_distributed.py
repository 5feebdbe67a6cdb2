"""Two processes give the gradients of one: DDP, FSDP2, norms whose statistics are synchronised.

Each process gets its share of a batch; the truth is one process with the whole batch.
"""

from __future__ import annotations

import copy
import io
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cbam_ext.smp

from support.samples import single_threaded
from support.treatments import LAYERS

pytestmark = pytest.mark.slow

WORLD = 2
LIMIT = timedelta(seconds=60)  # of one collective operation
Results = dict[str, Tensor | None]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# ------------------------------------------------------------------------------ two processes


class Processes:
    """Two processes that run a scenario together; starting them takes longer than any scenario."""

    def __init__(self, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._folder = folder
        self._runs = 0
        self._processes = []
        self._connections: list[Connection] = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            arguments = (rank, theirs, torch.are_deterministic_algorithms_enabled())
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, scenario: Callable[..., Any], *arguments: Any, backend: str = "gloo") -> list:
        """What ``scenario(rank, *arguments)`` returns in each process."""
        self._runs += 1
        for connection in self._connections:
            connection.send((backend, self._folder / str(self._runs), scenario, arguments))
        answers = [self._answer(connection) for connection in self._connections]
        failures = [f"process {rank}: {why}" for rank, (_, why) in enumerate(answers) if why]
        assert not failures, "\n".join(failures)
        return [result for result, _ in answers]

    def _answer(self, connection: Connection) -> tuple[Any, str]:
        try:
            if connection.poll(180):
                return torch.load(io.BytesIO(connection.recv_bytes()))
        except (EOFError, OSError) as error:
            return None, f"gone, {error!r}"
        self.stop()
        return None, "no answer"

    def stop(self) -> None:
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            process.kill()
            process.join()


def serve(rank: int, connection: Connection, deterministic: bool) -> None:
    """The life of a process.

    Each scenario has a process group of its own, lest one that fails puts the next out of step.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(deterministic)
    while True:
        try:
            backend, store, scenario, arguments = connection.recv()
        except EOFError:
            return
        result, failure = None, ""
        try:
            distributed.init_process_group(
                backend, init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=LIMIT
            )
            result = scenario(rank, *arguments)
        except Exception:
            failure = traceback.format_exc()
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
        answer = io.BytesIO()
        torch.save((result, failure), answer)
        connection.send_bytes(answer.getvalue())


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("stores"))
    yield processes
    processes.stop()


@pytest.fixture
def seed(generator: torch.Generator) -> int:
    """From which every process draws the same model and the same batch."""
    return generator.initial_seed()


# ------------------------------------------------------------------------------ models


def small_model(norm_layer: Callable[[int], nn.Module] | None) -> nn.Module:
    first = cbam_ext.CBAM(12, hidden_channels=6, kernel_size=3, mlp_bias=True, conv_bias=True)
    second = cbam_ext.CBAM(6, hidden_channels=6, mlp_bias=True, norm_layer=norm_layer)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), first, nn.Conv2d(12, 6, 3), second, nn.Conv2d(6, 2, 1)
    )


CLOSED = {"type": "cbam", "init": "default"}  # gates that hang on their input from the start


def slim_unet(attention: dict[str, str] | None = CLOSED) -> nn.Module:
    cbam_ext.smp.register()
    try:
        return smp.Unet(
            "tu-mobilenetv3_small_050",
            encoder_weights=None,
            decoder_channels=(32, 32, 16, 16, 16),
            decoder_attention_type=attention,
        )
    finally:
        cbam_ext.smp.unregister()


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def with_placed() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Block(6), Block(6), nn.Conv2d(6, 2, 1))
    options = {"hidden_channels": 6, "mlp_bias": True, "norm_layer": nn.BatchNorm2d}
    return cbam_ext.add_cbam(model, "residual", **options)


# In evaluation mode these treat each image alone, so a batch can be compared with its shares.
MODELS = {
    "small": lambda: small_model(lambda channels: nn.GroupNorm(1, channels)),
    "batch norm": lambda: small_model(nn.BatchNorm2d),
    "placed": with_placed,
    "unet": slim_unet,
    "pruned unet": lambda: cbam_ext.smp.prune_unused(slim_unet()),
    "placed in a unet": lambda: cbam_ext.smp.add_cbam(
        slim_unet(None), ["encoder", "decoder"], norm_layer="batchnorm"
    ),
}


def draw(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A model and a batch of four. Float64, so that nothing but an error can tell results apart."""
    torch.manual_seed(seed)
    size = 32 if "unet" in name else 9
    return MODELS[name]().double().eval(), torch.randn(4, 3, size, size, dtype=torch.float64)


def share(batch: Tensor, rank: int) -> Tensor:
    return batch.chunk(WORLD)[rank]


@single_threaded
def train(model: nn.Module, own: Tensor, batch: Tensor) -> Results:
    """Three steps with its own part of a batch: the gradients of the first, the parameters
    afterwards, and the output for the whole batch with these.

    More than one step, because DDP finds out in the second what went wrong in the first.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    parameters = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        mean_square(model(own)).backward()
        if step == 0:
            result = {f"gradient of {n}": whole(p.grad) for n, p in parameters.items()}
        optimizer.step()
    with torch.no_grad():
        result["output"] = model(batch)
    return result | {n: whole(p) for n, p in parameters.items()}


def in_one_process(name: str, seed: int) -> Results:
    model, batch = draw(name, seed)
    return train(model, batch, batch)


def mean_square(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32)).square().mean()


def whole(tensor: Tensor | None) -> Tensor | None:
    """A copy of a tensor, of all its shards if it has some."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return None if tensor is None else tensor.detach().clone()


def assert_same(found: Results, expected: Results, limit: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        value = found[name]
        assert (value is None) == (truth is None), name
        if value is None or truth is None:
            continue
        assert value.shape == truth.shape and value.isfinite().all(), name
        size, error = truth.abs().max(), (value.cpu().double() - truth).abs().max()
        # A small MLP may lie behind a dead ReLU, here and in other parts of a model.
        assert size > 0 or "spatial" not in name, name
        assert error <= limit * size, f"{name}: off by {error / size:.2g}"


# ------------------------------------------------------------------------------ DDP


def under_ddp(rank: int, name: str, seed: int, options: dict[str, bool]) -> Results:
    model, batch = draw(name, seed)
    return train(DistributedDataParallel(model, **options), share(batch, rank), batch)


STATIC = {"static_graph": True, "gradient_as_bucket_view": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("small", {}),
        ("small", STATIC),
        ("batch norm", {}),
        ("placed", {}),
        ("pruned unet", {}),
        ("pruned unet", STATIC),
        ("placed in a unet", {}),
        ("placed in a unet", STATIC),
        ("unet", {"find_unused_parameters": True}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else value,
)
def test_ddp(name: str, options: dict[str, bool], processes: Processes, seed: int) -> None:
    expected = in_one_process(name, seed)
    for found in processes.run(under_ddp, name, seed, options):
        assert_same(found, expected)


def attempt(rank: int, scenario: Callable[..., Any], *arguments: Any) -> str:
    try:
        scenario(rank, *arguments)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_ddp_needs_prune_unused(processes: Processes, seed: int) -> None:
    for answer in processes.run(attempt, under_ddp, "unet", seed, {}):
        # If this stops failing, smp or PyTorch has mended it and prune_unused has lost its reason.
        assert "not used in producing loss" in answer


def state_and_gradients(model: nn.Module) -> Results:
    result = {f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters()}
    statistics = ((n, b) for n, b in model.named_buffers() if b.is_floating_point())
    return result | {name: whole(buffer) for name, buffer in statistics}


def with_local_statistics(rank: int, seed: int) -> Results:
    model, batch = draw("batch norm", seed)
    parallel = DistributedDataParallel(model).train()
    for images in share(batch, rank).split(1):
        model.zero_grad()
        mean_square(parallel(images)).backward()
    with torch.no_grad():
        return state_and_gradients(model) | {"output": parallel.eval()(batch)}


def test_ddp_keeps_batch_norm_local(processes: Processes, seed: int) -> None:
    """Each step begins with the statistics of process 0, and each process updates its copy."""
    model, batch = draw("batch norm", seed)
    models = [copy.deepcopy(model).train() for _ in range(WORLD)]
    for rank, own in enumerate(models):
        own(share(batch, 0)[:1])
        mean_square(own(share(batch, rank)[1:])).backward()
    for parameters in zip(*(own.parameters() for own in models), strict=True):
        mean = torch.stack([parameter.grad for parameter in parameters]).mean(0)
        for parameter in parameters:
            parameter.grad = mean
    expected = [state_and_gradients(own) for own in models]
    with torch.no_grad():  # in evaluation all fold the statistics of process 0
        output = models[0].eval()(batch)
    for found, truth in zip(processes.run(with_local_statistics, seed), expected, strict=True):
        assert_same(found, truth | {"output": output})


# ------------------------------------------------------------------------------ FSDP2


def shard(model: nn.Module, parts: str, policy: MixedPrecisionPolicy) -> None:
    """Shards some parts of the model each for itself, norms in their own dtype; then the rest."""
    mesh = init_device_mesh("cpu", (WORLD,))
    cbams = [module for module in model.modules() if isinstance(module, cbam_ext.CBAM)]
    norms = [module.spatial.norm for module in cbams if module.spatial.norm is not None]
    first: dict[str, list[nn.Module]] = {
        "nothing": [],
        "each CBAM": cbams,
        "each norm": norms,
        "each layer": [module.get_submodule(name) for module in cbams for name in LAYERS],
        "each gate": [gate for module in cbams for gate in (module.channel, module.spatial)],
    }
    for module in first[parts]:
        fully_shard(module, mesh=mesh, **({} if module in norms else {"mp_policy": policy}))
    fully_shard(model, mesh=mesh, mp_policy=policy)


def under_fsdp(
    rank: int, name: str, seed: int, parts: str, dtype: torch.dtype | None = None
) -> Results:
    model, batch = draw(name, seed)
    if dtype is not None:
        model, batch = model.float(), batch.float()
    shard(model, parts, MixedPrecisionPolicy(param_dtype=dtype))
    return train(model, share(batch, rank), batch)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("small", "each CBAM"),
        ("small", "nothing"),
        ("small", "each norm"),
        ("small", "each layer"),
        ("small", "each gate"),
        ("batch norm", "each CBAM"),
        ("batch norm", "each norm"),
        ("pruned unet", "each CBAM"),
    ],
)
def test_fsdp(name: str, parts: str, processes: Processes, seed: int) -> None:
    expected = in_one_process(name, seed)
    for found in processes.run(under_fsdp, name, seed, parts):
        assert_same(found, expected)


@single_threaded
def shares_in_bfloat16(seed: int, parts: str) -> Results:
    """The mean gradients of the shares, where all but norms sharded apart are bfloat16."""
    model, batch = draw("small", seed)
    model.bfloat16()
    if parts == "each norm":
        model[3].spatial.norm.float()
    for rank in range(WORLD):
        (mean_square(model(share(batch, rank).bfloat16())) / WORLD).backward()
    return state_and_gradients(model)


@pytest.mark.parametrize("parts", ["each CBAM", "nothing", "each norm"])
def test_fsdp_in_mixed_precision(parts: str, processes: Processes, seed: int) -> None:
    exact = in_one_process("small", seed)
    rounded = shares_in_bfloat16(seed, parts)
    for found in processes.run(under_fsdp, "small", seed, parts, torch.bfloat16):
        assert found.pop("output").dtype == torch.bfloat16
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        # The processes may round their mean in another order.
        assert_same({name: found[name] for name in rounded}, rounded, 2**-7)
        together = [torch.cat([of[n].flatten() for n in rounded]) for of in (found, exact)]
        assert (together[0] - together[1]).norm() < 0.05 * together[1].norm()


# ------------------------------------------------------------------------------ SyncBatchNorm


class SumOverProcesses(torch.autograd.Function):
    """The gradient is a sum as well: what one process adds appears in the losses of all."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        distributed.all_reduce(grad)
        return grad


class SumsBatchNorm(nn.BatchNorm2d):
    """What SyncBatchNorm computes, in plain PyTorch: the real one refuses to train on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.training and input.shape[1] == 1
        count = input.new_tensor(input.numel())
        sums = torch.stack([count, input.sum(), input.square().sum()])
        count, total, squares = SumOverProcesses.apply(sums)
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (input - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def normed_module(
    seed: int, norm_layer: type[nn.Module] = nn.BatchNorm2d, batch: int = 4
) -> tuple[cbam_ext.CBAM, Tensor, Tensor]:
    """A CBAM with a BatchNorm that has seen something, a batch, a gradient of the output."""
    torch.manual_seed(seed)
    module = cbam_ext.CBAM(9, hidden_channels=6, mlp_bias=True, norm_layer=norm_layer).double()
    with torch.no_grad():
        module.spatial.conv.weight.mul_(4)
        for tensor in module.spatial.norm.state_dict().values():
            tensor.add_(torch.randint(1, 5, tensor.shape))
    x, upstream = torch.randn(2, batch, 9, 7, 6, dtype=torch.float64)
    return module, x, upstream


def test_sync_batch_norm_takes_over(seed: int) -> None:
    module, x, _ = normed_module(seed)
    model = nn.Sequential(module, cbam_ext.CBAM(9, norm_layer=nn.BatchNorm2d).double()).eval()
    before, expected = copy.deepcopy(model), model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for old, new in zip(before, converted, strict=True):
        assert type(new.spatial.norm) is nn.SyncBatchNorm
        assert new.spatial.norm.momentum == 0.01 and new.spatial.norm.eps == old.spatial.norm.eps
    for (name, new), (same, old) in zip(
        converted.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert name == same and torch.equal(new, old)
    assert torch.equal(converted(x), expected)


def train_sync_batch_norm_on_cpu(rank: int, seed: int) -> None:
    module, x, _ = normed_module(seed, nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        module(x)


def test_sync_batch_norm_refuses_a_cpu(processes: Processes, seed: int) -> None:
    """If this stops failing, the tests below need no stand-in any more."""
    processes.run(train_sync_batch_norm_on_cpu, seed)


def two_steps(module: nn.Module, batch: Tensor, upstream: Tensor, device: str = "cpu") -> Results:
    """Output and gradients of the second step, and the statistics that both have moved."""
    x = batch.to(device).requires_grad_()
    for _ in range(2):
        x.grad = None
        module.zero_grad()
        output = module(x)
        output.backward(upstream.to(device))
    core = module.module if isinstance(module, DistributedDataParallel) else module
    result = {"output": output, "gradient of the input": x.grad} | state_and_gradients(core)
    return {name: tensor.detach().cpu() for name, tensor in result.items()}


def synchronised(rank: int, seed: int, shares: list[int], gpu: bool) -> Results:
    norm_layer = nn.SyncBatchNorm if gpu else SumsBatchNorm
    module, *tensors = normed_module(seed, norm_layer, sum(shares))
    device = f"cuda:{rank % torch.cuda.device_count()}" if gpu else "cpu"
    own = (tensor.split(shares)[rank] for tensor in tensors)
    return two_steps(DistributedDataParallel(module.to(device)), *own, device)


def assert_synchronised(results: list[Results], seed: int, batch: int) -> None:
    """The same as one process with the whole batch and BatchNorm2d."""
    expected = two_steps(*normed_module(seed, batch=batch))
    in_shares = ("output", "gradient of the input")
    for result in results:
        found = {}
        for name, own in result.items():
            if name in in_shares:
                own = torch.cat([other[name] for other in results])
            elif name.startswith("gradient of"):
                own = own * WORLD  # DDP takes the mean of losses that are sums here
            found[name] = own
        assert_same(found, expected)


@pytest.mark.parametrize("shares", [[2, 2], [4, 1], [0, 3]], ids=str)
def test_synchronised_norm(shares: list[int], processes: Processes, seed: int) -> None:
    assert_synchronised(processes.run(synchronised, seed, shares, False), seed, sum(shares))


@needs_gpu  # which two processes may share, with gloo
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=needs_two_gpus)])
@pytest.mark.parametrize("shares", [[2, 2], [4, 1]], ids=str)
def test_sync_batch_norm_on_gpus(
    backend: str, shares: list[int], processes: Processes, seed: int
) -> None:
    found = processes.run(synchronised, seed, shares, True, backend=backend)
    assert_synchronised(found, seed, sum(shares))
