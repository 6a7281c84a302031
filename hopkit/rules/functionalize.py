"""functionalize: the op without mutation. Its subgraphs are made pure, and the op goes on as itself.

A subgraph that writes to an input, or an output that shares memory with one, never gets here: such a call is not
recorded as a node (hopkit/record.py).
"""

from __future__ import annotations

from typing import cast

from hopkit.extend import Call, OpSpec, Rule, hookimpl
from hopkit.extend.functionalize import Functionalizer, pure


@hookimpl
def hopkit_functionalize_rule(op: OpSpec) -> Rule:
    """The same rule for every op."""
    return functionalize


def functionalize(layer: Functionalizer, call: Call) -> object:
    """Call the op below functionalization, on plain tensors and pure subgraphs."""
    inputs = layer.unwrap_tensors(call.inputs)
    # The graph of a region is pure, and may hold what torch runs below functionalization alone.
    graphs = call.graphs if call.part else [pure(layer, graph) for graph in call.graphs]
    with layer.redispatch_to_next():
        outputs = call.replace(graphs=graphs, inputs=inputs)()
        return layer.wrap_tensors(cast("tuple[object, ...]", outputs))
