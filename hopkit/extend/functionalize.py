"""functionalize: ``rule(layer, call)``. Functionalization is still active while the rule runs; `Functionalizer`'s
``redispatch_to_next()`` turns it off."""

from __future__ import annotations

from typing import Protocol

import torch

from hopkit._torch import effects, functional, sizes, tracing
from hopkit._torch.functional import Functionalizer, active, assign, assignable
from hopkit.call import Call, GraphLike, Pure
from hopkit.extend.proxy import trace

__all__ = [
    "FunctionalizeRule",
    "Functionalizer",
    "active",
    "assign",
    "assignable",
    "automatic",
    "in_order",
    "pure",
]


class FunctionalizeRule(Protocol):
    """Gives the outputs of ``call``, wrapped by ``layer``."""

    def __call__(self, layer: Functionalizer, call: Call, /) -> object: ...


def pure(layer: Functionalizer, call: Call) -> list[GraphLike]:
    """The graphs of ``call`` without mutation. What they leave in their inputs is copied there in the end.

    Where they are differentiated or batched, views stay views: torch has no rule for some of their copies.
    """
    return [_pure(layer, graph, call.derivative) for graph in call.graphs]


def _pure(layer: Functionalizer, graph: GraphLike, views: bool) -> Pure:
    if isinstance(graph, Pure):  # torch cannot functionalize twice
        if functional.keeps_views(layer):
            return graph
        graph = graph.plain
    return Pure(functional.functionalized(layer, sizes.readable(graph), views=views), graph)


def automatic(layer: Functionalizer, call: Call) -> object:
    """The outputs of a call that writes to inputs, as torch makes any such operator functional: its own node holds it.

    None: torch has that for AOTAutograd's graphs alone, and not for those that are exported.
    """
    if torch.compiler.is_exporting():  # torch.export takes its node for operators only
        return None
    return functional.automatic(
        layer, call.target, call.schema(call.written), (*call.graphs, *call.inputs), call.keywords
    )


def in_order(layer: Functionalizer, call: Call) -> object:
    """The outputs of a call that has an effect, after all effects before it: AOTAutograd threads a token through them.

    None: here no token is threaded. In a graph, nodes of such ops keep the order in which they were written.
    """
    if torch.compiler.is_exporting() or not effects.threaded(layer):
        return None
    inputs = layer.unwrap_tensors(call.inputs)
    graphs, tracer = pure(layer, call), tracing.current(inputs)
    if tracer is not None:
        named = zip(call.graph_names(), graphs, call.replace(inputs=inputs).examples, strict=True)
        with tracing.not_recorded():
            graphs = [trace(tracer, name, graph, examples) for name, graph, examples in named]
    return effects.call(layer, call.target, (*graphs, call.inputs), call.keywords)
