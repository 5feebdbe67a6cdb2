"""torch.fx graphs of a module's own forward, and modules made of them."""

from __future__ import annotations

from torch import fx, nn


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace(module: nn.Module) -> fx.Graph:
    """The graph of ``module.forward``, in which every call of a submodule is one node."""
    return _Tracer().trace(module)


def graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module of class ``name`` that runs ``graph`` with the submodules of ``root``."""
    # A graph remembers the class that traced it, and a pickle of the module would ask for it.
    plain = fx.Graph()
    plain.output(plain.graph_copy(graph, {}))
    for node in plain.nodes:
        node.type = None  # annotations may be names that the new code does not know
    module = fx.GraphModule(root, plain, name)
    for inner, _ in module.named_modules():  # what holds the layers was made anew
        module.get_submodule(inner).training = root.get_submodule(inner).training
    return module
