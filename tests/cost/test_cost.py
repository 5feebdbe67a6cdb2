"""What a model costs: counted by hand, measured without a trace, told in a table."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

import cbam_ext.cost
import cbam_ext.smp
from cbam_ext.cost import Cost, CostTable, compare_costs, measure_cost

FLOAT = 4  # bytes


def facts(cost: Cost) -> tuple[int | None, ...]:
    """All that is not time."""
    return cost.parameters, cost.flops, cost.training_flops, cost.activation_bytes


def count(model: nn.Module, *inputs: torch.Tensor) -> tuple[int | None, ...]:
    return facts(measure_cost(model, *inputs, rounds=1))


class Recorder(nn.Module):
    """Tells a list who is called, and how."""

    def __init__(self, name: str, log: list[tuple[str, bool, bool]]) -> None:
        super().__init__()
        self.name, self.log = name, log
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append((self.name, self.training, torch.is_grad_enabled()))
        return self.layer(x)


# ------------------------------------------------------------------------------------------ counts


def test_a_linear_layer_by_hand():
    model, x = nn.Linear(7, 5), torch.randn(3, 7)
    forward = 2 * 3 * 7 * 5
    assert count(model, x) == (7 * 5 + 5, forward, 2 * forward, 0)
    # The gradient of the input is another product, as large.
    assert count(model, x.requires_grad_()) == (40, forward, 3 * forward, 0)


def test_convolutions_by_hand():
    n, h, w = 2, 9, 11
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    first, second = 2 * n * h * w * 3 * 6 * 9, 2 * n * h * w * 6 * 4
    # What the ReLU gives is kept once, by itself and by the layer behind it.
    assert count(model, torch.randn(n, 3, h, w)) == (
        (3 * 6 * 9 + 6) + (6 * 4 + 4),
        first + second,
        2 * first + 3 * second,
        n * 6 * h * w * FLOAT,
    )


def test_activations_of_a_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    cost = measure_cost(model, torch.randn(2, 3, 5, 7), rounds=1)
    assert cost.activation_bytes == (2 * 6 * 5 * 7 + 2 * 6) * FLOAT  # its input, mean and deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_cbam(dtype):
    n, c, h, w = 2, 24, 9, 10
    x = torch.randn(n, c, h, w, dtype=dtype, requires_grad=True)
    cbam = cbam_ext.CBAM(c, dtype=dtype)
    gates = (n * c + n * h * w) * FLOAT  # in float32 for both
    cost = measure_cost(cbam, x, rounds=1)
    assert cost.activation_bytes == gates
    # Within a model its input counts as well.
    behind = nn.Sequential(nn.Conv2d(c, c, 1, dtype=dtype), cbam)
    cost = measure_cost(behind, x.detach(), rounds=1)
    assert cost.activation_bytes == gates + n * c * h * w * dtype.itemsize


def test_cbam_beside_plain_pytorch():
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    ours = cbam_ext.CBAM(32)
    table = compare_costs({"plain": cbam_ext.to_plain(ours), "ours": ours}, x, rounds=1)
    plain, cost = table.costs["plain"], table.costs["ours"]
    assert (cost.parameters, cost.flops) == (plain.parameters, plain.flops)
    assert cost.parameters == 2 * 32 * 2 + 2 * 49
    assert cost.flops == 2 * (2 * 2 * 32 * 2 * 2) + 2 * 2 * 64 * 98
    assert plain.activation_bytes - cost.activation_bytes >= x.nbytes


def test_shared_and_frozen_parameters():
    layer = nn.Linear(4, 4, bias=False)
    assert count(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4))[0] == 16
    frozen = nn.Sequential(nn.Linear(4, 4, bias=False).requires_grad_(False), nn.Linear(4, 4))
    product = 2 * 2 * 4 * 4
    assert count(frozen, torch.randn(2, 4)) == (36, 2 * product, 3 * product, 2 * 4 * FLOAT)


class Several(nn.Module):
    """Results of all kinds, one of them without a gradient, one parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
        z = self.layer(x)
        return {"mask": [z, (z.exp(), y)], "index": z.argmax(), "note": "text"}


def test_several_inputs_and_results():
    x, y = torch.randn(2, 4), torch.arange(3)
    forward = 2 * 2 * 4 * 4
    assert count(Several(), x, y) == (4 * 4 + 4 + 3, forward, 2 * forward, 2 * 4 * FLOAT)


class Queries(nn.Module):
    """Gives a parameter to a layer, which the hooks of PyTorch's FLOP counter do not bear."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.layer = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.queries) * x


def test_a_parameter_as_input_of_a_layer():
    forward = 2 * 3 * 4 * 4
    assert count(Queries(), torch.randn(3, 4))[:3] == (12 + 20, forward, 3 * forward)


def test_nothing_to_train():
    x = torch.randn(2, 4)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    cost = measure_cost(frozen, x, rounds=1)
    assert facts(cost) == (20, 64, None, None) and cost.training_seconds is None
    assert cost.forward_seconds > 0
    table = compare_costs({"frozen": frozen, "free": nn.Linear(4, 4)}, x, rounds=1)
    assert table.costs["free"].training_seconds > 0
    assert table.ratios(training=True) == table.added(training=True) == {}
    lines = str(table).splitlines()
    assert lines[1].split()[-2:] == ["-", "-"] and lines[2].split()[-2:] == ["-", "-"]
    json.dumps(table.as_dict())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(mode):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with mode():
        cost = measure_cost(model, torch.randn(2, 4), rounds=1)
    assert facts(cost) == (40, 128, 320, 2 * 4 * FLOAT)


# ----------------------------------------------------------------------------------- without trace


class Restless(nn.Module):
    """Changes in training, in all ways that a module should be allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)  # writes to the image
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("places", torch.arange(3).expand(5, 3))  # cannot be written
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.drop(self.frozen(self.norm(self.conv(self.act(x)))))


def snapshot(model: nn.Module) -> dict[str, object]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {f"{n}.grad": None if p.grad is None else p.grad.clone() for n, p in named(model)}
    state |= {f"{name}.training": module.training for name, module in model.named_modules()}
    return state | {"random": torch.get_rng_state()}


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value is after[name], name


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_leaves_everything_as_it_was(fails):
    model, x = Restless(), torch.randn(2, 3, 5, 5)
    model(x.clone()).sum().backward()
    model.conv.bias.grad = None
    model.frozen.eval()
    model.drop.train()
    stepped = []
    model.conv.weight.register_post_accumulate_grad_hook(stepped.append)
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    broken = nn.Sequential(model, nn.Linear(4, 4))  # takes no such map
    before, image = snapshot(model), x.clone()
    if fails:
        with pytest.raises(RuntimeError):
            measure_cost(broken, x)
    else:
        measure_cost(model, x, rounds=2)
    assert_same(before, snapshot(model))
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert torch.equal(x, image) and x.grad is None
    assert not stepped  # an optimiser that steps in such a hook would have changed the weights


class Merging(nn.Module):
    """Merges weights for inference, as layers of low rank do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        if self.merged == mode:
            self.weight.data += -1 if mode else 1
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("mode", [True, False])
def test_a_train_method_that_does_more(mode: bool) -> None:
    model = Merging().train(mode)
    before = model.weight.detach().clone()
    measure_cost(model, torch.rand(2, 3), rounds=1)
    assert (model.training, model.merged) == (mode, not mode)
    assert torch.equal(model.weight, before)


def test_buffers_of_all_kinds_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("repeated", torch.full((1,), torch.nan).expand(5))
            self.register_buffer("growing", torch.zeros(2))
            self.register_buffer("empty", None)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.growing.resize_(len(self.growing) + 1)
            self.empty = torch.ones(1)
            self.register_buffer(f"new{len(self.growing)}", torch.ones(1))
            return self.norm(x)

    model = Odd()
    names = list(model._buffers)
    measure_cost(model, torch.rand(2, 3, 4, 4), rounds=1)
    assert list(model._buffers) == names and model.empty is None
    assert torch.equal(model.growing, torch.zeros(2))
    assert model.norm.num_batches_tracked == 0


def test_results_in_a_dataclass() -> None:
    @dataclasses.dataclass
    class Output:
        logits: Tensor

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Output:  # type: ignore[override]
            return Output(super().forward(x))

    assert measure_cost(Model(3, 2), torch.rand(4, 3), rounds=1).training_flops == 2 * 48


def test_leaves_the_gradient_of_an_input():
    x = torch.randn(2, 4, requires_grad=True)
    x.grad = gradient = torch.ones(2, 4)
    measure_cost(nn.Linear(4, 4), x, rounds=1)
    assert x.grad is gradient and x.requires_grad and torch.equal(gradient, torch.ones(2, 4))


def test_runs_in_turns_and_in_the_right_mode():
    log: list[tuple[str, bool, bool]] = []
    models = {name: Recorder(name, log).train(name == "a") for name in "abc"}
    compare_costs(models, torch.randn(4, 3), rounds=3)
    # Forward passes without gradients, training steps with them, and nothing else.
    assert {(training, gradient) for _, training, gradient in log} == {(False, False), (True, True)}
    for training in (False, True):
        calls = [name for name, mode, _ in log if mode == training]
        order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
        assert order == list("abc") * (2 + 3)  # counted, warmed up, and three rounds


# ------------------------------------------------------------------------------------------- table


def table_of(turns: dict[str, list[float]], training: dict[str, list[float]]) -> CostTable:
    costs = {
        name: Cost(1_500_000, 2 * 10**9, 6 * 10**9, kept << 20, 0.25, 0.5)
        for kept, name in enumerate(turns)
    }
    return CostTable(costs, next(iter(turns)), turns, training, "a device")


# Neither ratios nor differences of the medians are the medians within turns.
TURNS = {
    "none": [1.0, 2.0, 4.0, 1.0, 2.1],
    "plain": [1.5, 2.8, 4.5, 1.4, 2.4],  # beside none: 0.5 0.8 0.5 0.4 0.3
    "ours": [1.25, 2.3, 3.9, 1.25, 2.3],  # 0.25 0.3 -0.1 0.25 0.2
}


def test_ratios_are_taken_within_turns():
    table = table_of(TURNS, TURNS)
    assert table.ratios() == pytest.approx({"none": 1, "plain": 1.4, "ours": 1.15})
    assert table.added(training=True) == pytest.approx({"none": 0, "plain": 0.5, "ours": 0.25})
    assert table.times_added("plain", "ours") == pytest.approx(2)
    assert table.times_added("ours", "plain", training=True) == pytest.approx(0.5)


def test_what_is_noise_is_not_compared():
    noisy = TURNS | {"ours": [1.25, 1.9, 3.9, 1.25, 2.3]}  # slower in three of five
    table = table_of(noisy, {"plain": [1.0]})
    assert table.times_added("plain", "ours") is table.times_added("ours", "plain") is None
    assert table.times_added("plain", "plain") == 1
    assert table.times_added("plain", "ours", training=True) is None
    assert table.times_added("plain", "none") is None


def test_the_table_as_text():
    half = {name: [value / 2000 for value in turns] for name, turns in TURNS.items()}
    lines = str(table_of(TURNS, half)).splitlines()
    assert " ".join(lines[0].split()) == (
        "parameters FLOPs activations added forward ratio added training ratio added"
    )
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:]]
    # Two spaces or more part the cells; a baseline adds nothing.
    start, forward, training = ["1.50 M", "2.00 G"], "250 ms", "500 ms"

    def one_row(ratio: str, added_forward: str, added_training: str) -> list[str]:
        return [forward, ratio, added_forward, training, ratio, added_training]

    assert cells == [
        ["none", *start, "0 B", forward, "1.00", training, "1.00"],
        ["plain", *start, "1.0 MiB", "+1.0 MiB", *one_row("1.40", "+500 ms", "+0.250 ms")],
        ["ours", *start, "2.0 MiB", "+2.0 MiB", *one_row("1.15", "+250 ms", "+0.125 ms")],
    ]
    ends = {line.index(ratio) + 4 for line, ratio in ((lines[2], "1.40"), (lines[3], "1.15"))}
    assert ends == {lines[0].index("ratio") + len("ratio")}  # below each other


def test_memory_of_a_gpu_gets_a_column():
    table = table_of(TURNS, TURNS)
    costs = {n: dataclasses.replace(c, peak_bytes=3 << 20) for n, c in table.costs.items()}
    lines = str(dataclasses.replace(table, costs=costs)).splitlines()
    assert lines[0].split()[-1] == "peak" and lines[1].endswith("3.0 MiB")


def test_measured_numbers_fit_each_other():
    models = {"small": nn.Conv2d(2, 2, 1), "large": nn.Conv2d(2, 2, 3, padding=1)}
    table = compare_costs(models, torch.randn(1, 2, 16, 16), rounds=3, baseline="large")
    assert table.baseline == "large" and table.ratios()["large"] == 1
    found = json.loads(json.dumps(table.as_dict()))
    assert list(found["models"]) == ["small", "large"] and found["baseline"] == "large"
    small, large = found["models"].values()
    for direction in ("forward", "training"):
        turns = small[f"{direction}_turns"]
        assert len(turns) == 3 and small[f"{direction}_seconds"] == sorted(turns)[1] > 0
        pairs = [a / b for a, b in zip(turns, large[f"{direction}_turns"], strict=True)]
        assert small[f"{direction}_ratio"] == sorted(pairs)[1]
    assert (small["parameters"], large["parameters"]) == (6, 38)


# ------------------------------------------------------------------------------------------ errors


def test_errors():
    model, x = nn.Linear(3, 3), torch.randn(1, 3)
    with pytest.raises(TypeError, match="measure_cost: model must be a torch.nn.Module, got funct"):
        measure_cost(lambda x: x, x)
    with pytest.raises(TypeError, match=r"models\['b'\] must be a torch.nn.Module, got str"):
        compare_costs({"a": model, "b": "model"}, x)
    with pytest.raises(TypeError, match="Linear cannot be called with these inputs, too many pos"):
        measure_cost(model, x, (1, 3))
    for rounds in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"rounds must be a positive int, got {rounds}"):
            measure_cost(model, x, rounds=rounds)
    with pytest.raises(ValueError, match="at least one model"):
        compare_costs({}, x)
    with pytest.raises(ValueError, match="baseline must be one of a, b, got 'c'"):
        compare_costs({"a": model, "b": model}, x, baseline="c")
    with pytest.raises(ValueError, match="meta device"):
        measure_cost(copy.deepcopy(model).to("meta"), x)
    with pytest.raises(ValueError, match="on one device.*cpu, meta"):
        compare_costs({"a": model, "b": copy.deepcopy(model).to("meta")}, x)
