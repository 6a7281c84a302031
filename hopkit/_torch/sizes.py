"""Symbolic sizes. ``SymInt.node.expr`` (2.13, 2.14) prints as sympy does; if it is gone, every symbolic size becomes
``"?"`` and recorded subgraphs accept any size there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_symbols,
    free_unbacked_symbols,
    guard_or_true,
    is_concrete_int,
)

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
"""What torch raises where code on stand-ins asks for a value."""

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def describe(size: int) -> int | str:
    """A size as a number, or as the expression that it stands for."""
    if is_concrete_int(size):
        return int(size)
    return str(size)


def equal(expected: int, size: int) -> bool:
    """Whether two sizes are equal, taking sizes that nobody knows yet (unbacked) for equal."""
    return guard_or_true(expected == size)


def symbols(values: Iterable[object]) -> set[object]:
    """The symbols in the sizes of tensors, and in symbolic numbers."""
    found: set[object] = set()
    for value in values:
        if isinstance(value, (torch.Tensor, *SYMBOLIC)):
            found.update(free_symbols(value))
    return found


def unbacked(value: object) -> bool:
    """Whether this is a symbolic number that nobody knows before the op has run."""
    return isinstance(value, SYMBOLIC) and bool(free_unbacked_symbols(value))
