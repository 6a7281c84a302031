"""The op under ``torch.compile``."""

from __future__ import annotations

import torch

from hopkit.testing import graphs
from hopkit.testing.case import Callee, Case, Group, Outcome
from hopkit.testing.derivatives import derivatives
from hopkit.testing.values import values

GROUP = Group("dynamo")


@GROUP.column
def compiled(case: Case, callee: Callee) -> Outcome:
    """torch.compile, forward."""
    with torch.no_grad():
        return Outcome(values(case, graphs.compiled(case, callee, backend="aot_eager")))


@GROUP.column
def compiled_grad(case: Case, callee: Callee) -> Outcome:
    """torch.compile, forward and backward."""
    return Outcome(derivatives(case, graphs.compiled(case, callee, backend="aot_eager")))
