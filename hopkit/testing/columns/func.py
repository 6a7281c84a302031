"""The op under the transforms of ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from hopkit.testing.case import Callee, Case, Group, NotApplicable, Outcome
from hopkit.testing.compare import Pair
from hopkit.testing.derivatives import directional, first_derivatives, of_floats, slope
from hopkit.testing.tensors import Tensors, detached, tensors_in

GROUP = Group("func")


@GROUP.column
def vmap(case: Case, callee: Callee) -> Outcome:
    """A batch of two, against two calls."""
    if case.op.spec.random:
        raise NotApplicable("it draws random numbers, and others for a batch than for two calls")
    if not case.tensors or not case.others:
        raise NotApplicable("there is nothing to batch")
    both = (case.clones(), case.others[0])
    expected = [tensors_in(detached(case.on(case.body)(*case.clones(tensors)))) for tensors in both]
    batches = [torch.stack(pair) for pair in zip(*both, strict=True)]
    got = tensors_in(detached(torch.vmap(case.on(callee))(*batches)))
    return Outcome([Pair("the value", got, [torch.stack(pair) for pair in zip(*expected, strict=True)], strides=False)])


@GROUP.column
def jvp(case: Case, callee: Callee) -> Outcome:
    """``torch.func.jvp``."""
    (values, tangents), directions = directional(case)
    run, chosen = of_floats(case, case.on(callee))
    got = torch.func.jvp(run, tuple(t.detach() for t in chosen), tuple(directions))
    return Outcome([Pair("the value", list(got[0]), values), Pair("a tangent", list(got[1]), tangents, strides=False)])


@GROUP.column
def vjp(case: Case, callee: Callee) -> Outcome:
    """``torch.func.vjp``."""
    run, chosen = of_floats(case, case.on(callee))
    body, leaves = of_floats(case, case.on(case.body))
    leaves = [t.detach().requires_grad_() for t in leaves]
    expected = body(*leaves)
    got, pull = cast("tuple[Tensors, Callable[..., Tensors]]", torch.func.vjp(run, *(t.detach() for t in chosen)))
    return Outcome(
        [
            Pair("the value", detached(list(got)), detached(list(expected))),
            Pair("a gradient", list(pull(tuple(map(slope, got)))), first_derivatives(expected, leaves), strides=False),
        ]
    )
