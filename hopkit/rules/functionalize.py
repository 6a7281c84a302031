"""functionalize: the op without mutation. Its subgraphs are made pure, and the op goes on as itself.

A call that writes to operands becomes torch's own node for that, where torch has one, or the op on copies of them. An
output that shares memory with an input never gets here: such a call is not recorded as a node (hopkit/record.py).
"""

from __future__ import annotations

from typing import cast

import torch

from hopkit.extend import Call, OpSpec, Rule, hookimpl
from hopkit.extend.functionalize import Functionalizer, active, assign, assignable, automatic, in_order, pure


@hookimpl
def hopkit_functionalize_rule(op: OpSpec) -> Rule:
    """The same rule for every op."""
    return functionalize


def functionalize(layer: Functionalizer, call: Call) -> object:
    """Call the op below functionalization, on plain tensors and pure subgraphs."""
    if torch.compiler.is_exporting() and not call.part and any(call.rehearsal.writing):
        # torch.export takes no graph that writes to what it is given.
        giving = call.giving()
        return in_place(layer, call) if giving is None else functionalize(layer, giving)
    if call.written:
        return writing(layer, call)
    if call.op.effectful and (found := in_order(layer, call)) is not None:
        return found
    inputs = layer.unwrap_tensors(call.inputs)
    # The graph of a region is pure, and may hold what torch runs below functionalization alone.
    graphs = call.graphs if call.part else pure(layer, call)
    with layer.redispatch_to_next():
        outputs = call.replace(graphs=graphs, inputs=inputs)()
        return layer.wrap_tensors(cast("tuple[object, ...]", outputs))


def writing(layer: Functionalizer, call: Call) -> object:
    """As `functionalize`, for a call that writes to inputs: they are given what it wrote."""
    if call.entangled or not all(assignable(layer, call.inputs[i]) for i in call.written):
        return in_place(layer, call)
    found = None if call.op.effectful else automatic(layer, call)
    if found is not None:
        return found
    return call.on_copies(lambda copied: functionalize(layer, copied), lambda old, new: assign(layer, old, new))


def in_place(layer: Functionalizer, call: Call) -> object:
    """Functionalization sees the body instead of the op."""
    with active(layer):
        return call.run()
