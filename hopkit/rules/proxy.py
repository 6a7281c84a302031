"""proxy: one node per call, and one graph per subgraph and signature, shared by all calls of a trace."""

from __future__ import annotations

from hopkit.extend import Call, OpSpec, Rule, hookimpl
from hopkit.extend.proxy import Tracer, needs_gradient, node, trace


@hookimpl
def hopkit_proxy_rule(op: OpSpec) -> Rule:
    """The same rule for every op."""
    return record


def record(tracer: Tracer, call: Call) -> object:
    """Trace every subgraph on what the op calls it with, then write one node."""
    graphs = [
        trace(tracer, name, graph, examples)
        for name, graph, examples in zip(call.graph_names(), call.graphs, call.examples, strict=True)
    ]
    recorded = call.replace(graphs=graphs)
    # Above autograd, which comes after this: a traced graph does not tell of a derivative that is not its own.
    told = not (tracer.above_autograd and needs_gradient(call.inputs) and call.layout and call.unseen)
    return node(tracer, recorded, gives=None if told else call)
