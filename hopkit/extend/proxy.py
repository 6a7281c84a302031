"""proxy: ``rule(tracer, call)``. The proxy mode is not active while the rule runs; `Tracer` writes to its graph."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.fx import GraphModule

from hopkit._torch.autograd import needs_gradient
from hopkit._torch.levels import base
from hopkit._torch.tracing import Tracer
from hopkit.call import Call, GraphLike, key_of, with_gradients
from hopkit.errors import SubgraphError
from hopkit.layout import Meta, Slots

__all__ = ["ProxyRule", "Tracer", "lifted", "needs_gradient", "node", "trace"]


class ProxyRule(Protocol):
    """Writes the call into the graph, and gives its outputs."""

    def __call__(self, tracer: Tracer, call: Call, /) -> object: ...


def trace(tracer: Tracer, name: str, graph: GraphLike, examples: Sequence[object]) -> GraphModule:
    """``graph`` as a submodule of the graph being recorded; what was traced before in the same way is shared."""
    slots = Slots(unique=())
    asking = [getattr(value, "requires_grad", False) for value in slots.inputs]  # torch's own code asks, as for LSTM
    key = (key_of(graph), repr(slots.split(tuple(examples))), *map(Meta.of, slots.inputs), *asking)
    return tracer.trace(name, graph, examples, key, gradients=with_gradients(graph))


def lifted(tracer: Tracer, call: Call) -> Call:
    """``call`` with the constants of its graphs, such as a tensor that a subgraph makes, as inputs: so it can be saved.

    A node that has no layout stays as it is.

    Raises:
        SubgraphError: A graph holds what a transform of torch.func made, which is nothing outside of it.
    """
    if call.layout is None:
        return call
    constants = [tracer.lift(graph) if isinstance(graph, GraphModule) else () for graph in call.graphs]
    if any(base(constant) is not constant for constant in itertools.chain(*constants)):
        raise SubgraphError(
            f"a subgraph of op '{call.op.name}'",
            "differentiates with torch.func, and cannot be exported like that",
            why="torch.export loses what torch.func wraps, and the program would compute with a stand-in",
            todo="Use `torch.autograd.grad` in it, and export with `strict=False`",
        )
    return call.capturing(constants)


def node(tracer: Tracer, call: Call, *, gives: Call | None = None) -> object:
    """Write ``call``, whose graphs are submodules of the graph, as one node; gives its outputs, those of ``gives``."""
    if torch.compiler.is_exporting():
        call = lifted(tracer, call)
    outputs = (gives or call)()
    return tracer.emit(call.target, (*call.graphs, call.nested), call.keywords, outputs)
