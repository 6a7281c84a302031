"""The op without mutation."""

from __future__ import annotations

import torch

from hopkit.testing.case import Callee, Case, Group, Outcome
from hopkit.testing.graphs import kept, rerun, trace
from hopkit.testing.values import values

GROUP = Group("functionalize")


@GROUP.column
def functionalize(case: Case, callee: Callee) -> Outcome:
    """The call without mutation."""
    return Outcome(values(case, torch.func.functionalize(case.on(callee))))


@GROUP.column
def functionalize_make_fx(case: Case, callee: Callee) -> Outcome:
    """The call without mutation, as a graph."""
    graph = trace(case, torch.func.functionalize(case.on(callee)))
    return Outcome(rerun(case, graph), kept(case, graph))
