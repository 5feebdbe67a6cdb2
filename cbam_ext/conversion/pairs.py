"""Finds a channel gate and a spatial gate that a larger module multiplies in its own forward.

torch.fx traces that forward, with every submodule as one node. Where the graph shows that the two
gates and their products are a CBAM and that nothing else looks at what lies between, they become
one node, and the module gets the new forward; so does a gate alone with its product. A forward that
cannot be traced, does something else in training, or uses its gates otherwise is left alone, with
the reason. Plain attributes that it reads count with the values that they have at that moment.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .._inputs import Call
from .behaviour import recognise
from .comparison import compare
from .graphs import trace
from .references import References
from .rewriting import rewrite
from .structure import (
    RefusalError,
    Structure,
    dense_shape,
    find_structures,
    is_norm,
    is_spatial,
    weight_layers,
)
from .translation import build

# A product in place is traced as an ordinary one; whether that matters, the comparison tells.
_PRODUCTS = {operator.mul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}


def is_channel_gate(module: nn.Module) -> bool:
    """Whether ``module`` has the layers of a shared MLP, and no others."""
    shapes = [dense_shape(layer) for layer in weight_layers(module).values()]
    return len(shapes) == 2 and shapes[0] is not None and shapes[0][::-1] == shapes[1]


def is_spatial_gate(module: nn.Module) -> bool:
    """Whether ``module`` has a convolution from two maps to one, at most a norm, no other layer."""
    layers = list(weight_layers(module).values())
    convs = [layer for layer in layers if is_spatial(layer)]
    return len(convs) == 1 and all(layer is convs[0] or is_norm(layer) for layer in layers)


def direct_children(module: nn.Module) -> Iterator[nn.Module]:
    """The children, and those in a ModuleList or ModuleDict in place of that."""
    for child in module.children():
        if has_forward(child):
            yield child
        else:
            yield from direct_children(child)


def has_forward(module: nn.Module) -> bool:
    """Whether ``module`` can be called, as containers of modules cannot."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).forward is not nn.Module.forward


def has_pair(parent: nn.Module) -> bool:
    """Whether children of ``parent`` may be the two halves of a CBAM."""
    children = list(direct_children(parent))
    return any(map(is_channel_gate, children)) and any(map(is_spatial_gate, children))


def has_gates(parent: nn.Module) -> bool:
    """Whether children of ``parent`` may be gates of a CBAM."""
    return any(is_channel_gate(c) or is_spatial_gate(c) for c in direct_children(parent))


class Multiplied(nn.Module):
    """Gates put together as a graph says: the module that is compared with a CBAM.

    ``outside`` tells for each whether the product is outside of it. Its children have the names of
    ours: "channel" and "spatial", or one of them.
    """

    def __init__(self, gates: Mapping[str, nn.Module], outside: Sequence[bool]) -> None:
        super().__init__()
        for name, gate in gates.items():
            self.add_module(name, gate)
            self.training = gate.training
        self.outside = tuple(outside)

    def forward(self, x: Tensor) -> Tensor:
        for gate, outside in zip(self.children(), self.outside, strict=True):
            x = gate(x) * x if outside else gate(x)
        return x


@dataclass
class Replacement:
    """What is replaced: gates, as what, and their names in ours and in the module around them."""

    gates: Multiplied
    structure: Structure
    names: dict[str, str]

    @property
    def name(self) -> str:
        """Where the CBAM stands: in the place of the first gate."""
        return next(iter(self.names.values()))

    def holder(self, parent: nn.Module) -> nn.Module:
        """The module that has the first gate as a child: ``parent``, or a container in it."""
        return parent.get_submodule(self.name.rpartition(".")[0])


@dataclass
class _Match(Replacement):
    """The same in a graph: the first gate's node, and all nodes from the result back to it."""

    nodes: tuple[fx.Node, ...]


def is_sequence(parent: nn.Module) -> bool:
    """Whether ``parent`` runs its children one after the other, as ``nn.Sequential`` does."""
    return isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward


def replace_pairs(
    parent: nn.Module, example: Call | None, references: References
) -> list[Replacement]:
    """Replaces each pair of gates in ``parent`` by one CBAM.

    ``example`` are arguments that ``parent`` can be called with, for a comparison; without them
    some are tried.

    Raises:
        RefusalError: not every spatial gate is provably half of a CBAM. ``parent`` is unchanged.
    """
    _check_forward(parent)
    if is_sequence(parent):
        return _replace_in_sequence(parent, references)
    graph = _trace(parent)
    matches = [_match(parent, node) for node in graph.nodes if _calls_spatial(parent, node)]
    if not matches:
        raise RefusalError("its forward never calls its spatial gate")
    return _replace_in_graph(parent, graph, matches, example, references)


def replace_lone_gates(
    parent: nn.Module,
    gates: Mapping[nn.Module, Structure],
    example: Call | None,
    references: References,
) -> list[Replacement]:
    """The same for gates that stand alone: children of ``parent`` that return their gate."""
    _check_forward(parent)
    graph = _trace(parent)
    matches = []
    for node in graph.nodes:
        gate = _calls(parent, node)
        if gate is not None and gate in gates:
            matches.append(_match_alone(parent, node, gates[gate]))
    if not matches:
        raise RefusalError("its forward never calls its gate")
    return _replace_in_graph(parent, graph, matches, example, references)


def _check_forward(parent: nn.Module) -> None:
    if "forward" in vars(parent):
        raise RefusalError("its forward was replaced on the instance")


def _replace_in_graph(
    parent: nn.Module,
    graph: fx.Graph,
    matches: list[_Match],
    example: Call | None,
    references: References,
) -> list[Replacement]:
    for match in matches:
        references.check(match.gates.children(), match.holder(parent))
        result, first = match.nodes[0], match.nodes[-1]
        with graph.inserting_before(first):
            node = graph.call_module(match.name, (first.args[0],))
        result.replace_all_uses_with(node)
        for node in match.nodes:
            for reshaped in list(node.users):
                graph.erase_node(reshaped)
            graph.erase_node(node)
    before, rewritten = copy.deepcopy(parent), copy.deepcopy(parent)
    _apply(rewritten, graph, matches)
    compare(before, rewritten, example)
    _apply(parent, graph, matches)
    return [*matches]


def _apply(parent: nn.Module, graph: fx.Graph, matches: Sequence[Replacement]) -> None:
    for match in matches:
        own = {ours: parent.get_submodule(theirs) for ours, theirs in match.names.items()}
        put(parent, match.name, build(Multiplied(own, match.gates.outside), match.structure))
        for other in [*match.names.values()][1:]:
            holder, _, last = other.rpartition(".")
            del parent.get_submodule(holder)._modules[last]
    rewrite(parent, graph)


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule called ``name``."""
    holder, _, last = name.rpartition(".")
    parent.get_submodule(holder)._modules[last] = module


def _replace_in_sequence(parent: nn.Sequential, references: References) -> list[Replacement]:
    replaced = []
    reason = "its gates do not follow each other"
    for first, second in itertools.pairwise([*parent._modules]):
        channel, spatial = parent._modules[first], parent._modules[second]
        if not (is_channel_gate(channel) and is_spatial_gate(spatial)):
            continue
        gates = Multiplied({"channel": channel, "spatial": spatial}, (False, False))
        try:
            references.check((channel, spatial), parent)
            structure = recognise(gates, find_structures(gates))
        except RefusalError as error:
            reason = str(error)
            continue
        replaced.append(Replacement(gates, structure, {"channel": first, "spatial": second}))
        parent._modules[first] = build(gates, structure)
        parent._modules[second] = nn.Identity()
    if not replaced:
        raise RefusalError(reason)
    return replaced


# ------------------------------------------------------------------------------------------ trace


def _trace(parent: nn.Module) -> fx.Graph:
    """The graph of ``parent.forward``, if it is the same in training and in inference."""
    parameters = inspect.signature(parent.forward).parameters.values()
    if any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise RefusalError("its forward has optional arguments, so one trace does not show it all")
    modes = {module: module.training for module in parent.modules()}
    attributes, graphs = dict(vars(parent)), []
    try:
        for mode in (True, False):
            for module in modes:
                module.training = mode
            graphs.append(trace(parent))
        stores = {k: v for k, v in vars(parent).items() if attributes.get(k) is not v}
    except RefusalError:
        raise
    except Exception as error:
        raise RefusalError(
            f"torch.fx cannot trace its forward: {type(error).__name__}: {error}"
        ) from error
    finally:
        vars(parent).clear()
        vars(parent).update(attributes)
        for module, mode in modes.items():
            module.training = mode
    if stores.keys() - {"training"}:
        raise RefusalError("its forward stores attributes")
    code = [graph.python_code("self").src for graph in graphs]
    if code[0] != code[1]:
        raise RefusalError("its forward does something else in training")
    return graphs[0]


def _calls(parent: nn.Module, node: object) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1:
        return parent.get_submodule(str(node.target)) if not node.kwargs else None
    return None


def _calls_spatial(parent: nn.Module, node: fx.Node) -> bool:
    module = _calls(parent, node)
    return module is not None and is_spatial_gate(module)


def _calls_channel(parent: nn.Module, node: fx.Node) -> bool:
    module = _calls(parent, node)
    return module is not None and is_channel_gate(module)


def _match(parent: nn.Module, spatial: fx.Node) -> _Match:
    """The CBAM that ``spatial`` is the second half of."""
    middle, result, spatial_multiplied = _product(spatial)
    if not isinstance(middle, fx.Node):
        raise RefusalError("what its spatial gate sees is not in the graph")
    if _calls_channel(parent, middle):
        channel, channel_multiplied = middle, False
    else:
        inputs = middle.all_input_nodes
        inputs = [*inputs, *(further for node in inputs for further in node.all_input_nodes)]
        channel = next((node for node in inputs if _calls_channel(parent, node)), None)
        if channel is None:
            raise RefusalError("its spatial gate does not see what its channel gate refined")
        _, product, channel_multiplied = _product(channel)
        if product is not middle or not channel_multiplied:
            raise RefusalError("what it does with its channel gate is not one plain product")
    between = {spatial, result, *(user for user in spatial.users if _expands(user, spatial))}
    if not set(middle.users) <= between:
        raise RefusalError("what lies between its two gates is used elsewhere too")
    names = {"channel": str(channel.target), "spatial": str(spatial.target)}
    for name in names.values():
        _check_used_once(spatial.graph, name)
    own = {ours: parent.get_submodule(theirs) for ours, theirs in names.items()}
    gates = Multiplied(own, (channel_multiplied, spatial_multiplied))
    structures = find_structures(gates)
    if not structures:
        raise RefusalError("the layers of its two gates are not those of a CBAM")
    structure = recognise(gates, structures)
    # A gate that returns the refined map is the map's node itself.
    nodes = tuple(dict.fromkeys((result, spatial, middle, channel)))
    return _Match(gates, structure, names, nodes)


def _match_alone(parent: nn.Module, gate: fx.Node, structure: Structure) -> _Match:
    """The gate alone that ``gate`` calls, whose layers ``structure`` names as in itself."""
    _, result, outside = _product(gate)
    if not outside:
        raise RefusalError("what it does with its gate is not one plain product")
    name = str(gate.target)
    _check_used_once(gate.graph, name)
    (ours,) = {layer.partition(".")[0] for layer in structure.layers()}
    gates = Multiplied({ours: parent.get_submodule(name)}, (True,))
    return _Match(gates, structure, {ours: name}, (result, gate))


def _check_used_once(graph: fx.Graph, name: str) -> None:
    if sum(node.target == name for node in graph.nodes) > 1:
        raise RefusalError(f"its forward uses {name} more than once")


def _product(gate: fx.Node) -> tuple[object, fx.Node, bool]:
    """What ``gate`` is called with, where the refined map is, and whether by a product outside.

    A call whose result is multiplied by its own argument is a gate; any other is taken to return
    the refined map, which a comparison will tell.
    """
    argument = gate.args[0]
    users = [user for user in gate.users if not _expands(user, gate)]
    expanded = [user for user in gate.users if _expands(user, gate)]
    users += [user for node in expanded for user in node.users]
    forms = {gate, *expanded}
    if len(users) == 1 and users[0].target in _PRODUCTS:
        factors = list(users[0].args)
        others = [factor for factor in factors if factor not in forms]
        if len(factors) == 2 and others == [argument]:
            return argument, users[0], True
    return argument, gate, False


def _expands(node: fx.Node, gate: fx.Node) -> bool:
    return (
        node.op == "call_method" and node.target in ("expand_as", "expand") and node.args[0] is gate
    )
