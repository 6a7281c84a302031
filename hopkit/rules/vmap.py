"""vmap: the op whose body is vmap(body), with the same subgraphs, called below the vmap that asks."""

from __future__ import annotations

from hopkit.extend import Call, OpSpec, Rule, hookimpl
from hopkit.extend.vmap import Batch, on_call


@hookimpl
def hopkit_vmap_rule(op: OpSpec) -> Rule:
    """The same rule for every op."""
    return transform


@on_call
def transform(batch: Batch, call: Call) -> object:
    """Say in the layout which input is batched, and where; outputs are batched in their first dimension."""
    inputs, dims = batch.unwrap(call.inputs)
    with batch.lower():
        if all(dim is None for dim in dims):
            return call.replace(inputs=inputs)()
        outputs = call.vmap(inputs, dims, batch.randomness)()
    assert isinstance(outputs, tuple)
    return tuple(map(batch.wrap, outputs))
