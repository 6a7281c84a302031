"""proxy: ``rule(tracer, call)``. The proxy mode is not active while the rule runs; `Tracer` writes to its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch.fx import GraphModule

from hopkit._torch.autograd import needs_gradient
from hopkit._torch.tracing import Tracer
from hopkit.call import Call, GraphLike, key_of, with_gradients
from hopkit.layout import Meta, Slots

__all__ = ["ProxyRule", "Tracer", "needs_gradient", "node", "trace"]


class ProxyRule(Protocol):
    """Writes the call into the graph, and gives its outputs."""

    def __call__(self, tracer: Tracer, call: Call, /) -> object: ...


def trace(tracer: Tracer, name: str, graph: GraphLike, examples: Sequence[object]) -> GraphModule:
    """``graph`` as a submodule of the graph being recorded; what was traced before in the same way is shared."""
    slots = Slots(unique=False)
    asking = [getattr(value, "requires_grad", False) for value in slots.inputs]  # torch's own code asks, as for LSTM
    key = (key_of(graph), repr(slots.split(tuple(examples))), *map(Meta.of, slots.inputs), *asking)
    return tracer.trace(name, graph, examples, key, gradients=with_gradients(graph))


def node(tracer: Tracer, call: Call) -> object:
    """Write ``call``, whose graphs are submodules of the graph, as one node; gives its outputs."""
    return tracer.emit(call.target, (*call.graphs, call.nested), call.keywords, call())
