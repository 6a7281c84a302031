"""The op under autograd, in both directions."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from hopkit.testing.case import Callee, Case, Group, NotApplicable, Outcome
from hopkit.testing.compare import Pair
from hopkit.testing.derivatives import derivatives, directional, slope
from hopkit.testing.tensors import detached, differentiable, floats_in
from hopkit.testing.values import requires_grad, seeded

GROUP = Group("autograd")


@GROUP.column
def grad(case: Case, callee: Callee) -> Outcome:
    """Gradients, or the error that the op's policy promises."""
    return Outcome(derivatives(case, case.on(callee))) if case.derives else _policy(case, callee)


def _policy(case: Case, callee: Callee) -> Outcome:
    inputs, expected_inputs = case.leaves(), case.leaves()
    name, policy = case.op.spec.name, case.op.spec.autograd
    expected = seeded(case.on(case.body), expected_inputs)
    if not any(requires_grad(expected)):
        raise NotApplicable("nothing in this sample has a gradient")
    pairs: list[Pair] = []
    try:
        got = seeded(case.on(callee), inputs)
        pairs = [Pair("the value", detached(got), detached(expected))]
        # Not `first_derivatives`: an output that is cut off from the inputs raises only where backward runs it.
        results = floats_in(got)
        torch.autograd.backward(results, [slope(t) for t in results])
        raised = "no error"
    except RuntimeError as error:
        raised = str(error)
    promised = f"Autograd not implemented for {name}" if policy == "deferred_error" else f"op '{name}'"
    where = "in backward" if pairs else "at the call"
    found = Pair(
        "the error",
        (where, promised if promised in raised else raised),
        ("in backward" if policy == "deferred_error" else "at the call", promised),
    )
    return Outcome([*pairs, found], f'raises {where}, as autograd="{policy}" says')


@GROUP.column
def gradgrad(case: Case, callee: Callee) -> Outcome:
    """Second derivatives."""
    return Outcome(derivatives(case, case.on(callee), second=True))


@GROUP.column
def forward_mode(case: Case, callee: Callee) -> Outcome:
    """Tangents of dual numbers."""
    inputs, run = case.clones(), case.on(callee)
    expected, directions = directional(case)
    with forward_ad.dual_level():
        chosen = iter(directions)
        duals = [forward_ad.make_dual(t.detach(), next(chosen)) if differentiable(t) else t for t in inputs]
        results = [forward_ad.unpack_dual(t) for t in floats_in(seeded(run, duals))]
        tangents = [torch.zeros_like(p) if t is None else t for p, t in results]
        values = [p for p, _ in results]
    return Outcome([Pair("the value", values, expected[0]), Pair("a tangent", tangents, expected[1], strides=False)])
