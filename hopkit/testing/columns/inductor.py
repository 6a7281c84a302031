"""The op in the code that Inductor writes."""

from __future__ import annotations

import torch

from hopkit.testing import graphs
from hopkit.testing.case import Callee, Case, Group, Outcome, Run
from hopkit.testing.derivatives import derivatives
from hopkit.testing.values import values

GROUP = Group("inductor")


@GROUP.column
def inductor(case: Case, callee: Callee) -> Outcome:
    """torch.compile with Inductor, forward."""
    with torch.no_grad():
        return Outcome(values(case, _compiled(case, callee)))


@GROUP.column
def inductor_grad(case: Case, callee: Callee) -> Outcome:
    """torch.compile with Inductor, forward and backward."""
    return Outcome(derivatives(case, _compiled(case, callee)))


def _compiled(case: Case, callee: Callee) -> Run:
    # Inductor's own random numbers are others than eager's.
    return graphs.compiled(case, callee, options={"fallback_random": True})
