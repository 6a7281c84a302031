"""jvp: the op whose body is jvp(body), with the same subgraphs, called below the jvp that asks."""

from __future__ import annotations

from hopkit.extend import Call, OpSpec, Rule, hookimpl
from hopkit.extend.jvp import Tangents, differentiable, on_call


@hookimpl
def hopkit_jvp_rule(op: OpSpec) -> Rule:
    """The same rule for every op."""
    return transform


@on_call
def transform(level: Tangents, call: Call) -> object:
    """Hand the tangents over as inputs of their own, and take those of the outputs from behind them."""
    inputs, tangents = level.unpack(call.inputs)
    if tangents and call.handwritten:
        return call.run()  # forward-mode AD sees the body instead
    outputs = call.rehearsal.outputs
    assert isinstance(outputs, tuple)
    given = [i for i, output in enumerate(outputs) if differentiable(output)] if tangents else []
    with level.lower():
        plain = call.replace(inputs=inputs)
        results = (plain.jvp(inputs, tangents, given) if given else plain)()
    assert isinstance(results, tuple)
    return level.pack(results[: len(outputs)], dict(zip(given, results[len(outputs) :], strict=True)))
