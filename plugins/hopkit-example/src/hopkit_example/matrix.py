"""What brings the mode and the tensor class to hopkit: the hooks, and a column of the matrix for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hopkit.extend import Mode, OpSpec, Rule, hookimpl
from hopkit.testing import Case, Column, Group, Outcome, outcome, outcome_of_class
from hopkit_example.mode import LogOps, Made, held, log_whole, make_whole

GROUP = Group("example")


@hookimpl
def hopkit_add_modes() -> Iterable[Mode]:
    """Brings both, and with them the two hooks below."""
    yield Mode("log_ops", entry=LogOps, gives="the op's value, with its name in the log")
    yield Mode("made", entry=Made, gives="the op's value, in tensors that know the op's name")


@hookimpl
def hopkit_log_ops_rule(op: OpSpec) -> Rule:  # noqa: ARG001 - the hook's own; the answer is the same for every op
    """The one rule of the mode. It serves every op there is, and every op to come."""
    return log_whole


@hookimpl
def hopkit_made_rule(op: OpSpec) -> Rule:  # noqa: ARG001 - as above
    """The one rule of the class."""
    return make_whole


@hookimpl
def hopkit_add_columns() -> Iterable[Column]:
    """Two more columns, for every op that is checked."""
    return GROUP.columns


@GROUP.column
def log_ops(case: Case, callee: Callable[..., object]) -> Outcome:
    """Within the mode."""

    def logged(*tensors: torch.Tensor) -> object:
        with LogOps():
            return case.on(callee)(*tensors)

    return outcome(case, logged)


@GROUP.column
def made(case: Case, callee: Callable[..., object]) -> Outcome:
    """On tensors of the class."""
    return outcome_of_class(case, case.on(callee), Made, held)
