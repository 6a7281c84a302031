"""The op under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hopkit.testing.case import Callee, Case, Group, Outcome, Run
from hopkit.testing.derivatives import derivatives
from hopkit.testing.values import values

GROUP = Group("dynamo")


@GROUP.column
def compiled(case: Case, callee: Callee) -> Outcome:
    """torch.compile, forward."""
    with torch.no_grad():
        return Outcome(values(case, _compiled(case, callee)))


@GROUP.column
def compiled_grad(case: Case, callee: Callee) -> Outcome:
    """torch.compile, forward and backward."""
    return Outcome(derivatives(case, _compiled(case, callee)))


def _compiled(case: Case, callee: Callee) -> Run:
    torch.compiler.reset()

    def entry(args: Iterable[object], kwargs: dict[str, object]) -> object:
        return callee(*args, **kwargs)

    run = torch.compile(entry, backend="aot_eager", fullgraph=True)
    return lambda *tensors: run(*case.arguments(tensors))
