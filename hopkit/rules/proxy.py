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
    if tracer.above_autograd and call.layout is not None and needs_gradient(call.inputs) and call.rehearsal.opaque:
        return tracer.inside(call.run)  # autograd would differentiate the graphs, which do not say it all
    graphs = [
        trace(tracer, name, graph, examples)
        for name, graph, examples in zip(call.graph_names(), call.graphs, call.examples, strict=True)
    ]
    return node(tracer, call.replace(graphs=graphs))
