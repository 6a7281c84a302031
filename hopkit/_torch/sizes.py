"""Symbolic sizes. ``SymInt`` prints as its sympy expression (2.13, 2.14); if it no longer does, every symbolic size is
one that `hopkit.codec.evaluate` cannot read, and recorded subgraphs accept any size there.

``torch.fx.experimental.symbolic_shapes`` is imported inside the functions that need it: it loads sympy, which adds a
fifth to ``import torch``, and by the time there is a symbol torch has loaded it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def describe(size: int) -> int | str:
    """A size as a number, or as the expression that it stands for."""
    if not isinstance(size, SYMBOLIC):
        return int(size)
    expression = str(size)
    return int(expression) if expression.isdigit() else expression


def equal(expected: int, size: int, *, surely: bool) -> bool:
    """Whether two sizes are equal. What nobody knows yet (unbacked) counts as equal, unless this must be sure."""
    same = expected == size
    if not isinstance(same, SYMBOLIC):
        return same
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    return guard_or_false(same) if surely else guard_or_true(same)


def symbols(values: Iterable[object]) -> set[object]:
    """The symbols in the sizes of tensors, and in symbolic numbers."""
    numbers = [n for v in values for n in (v.shape if isinstance(v, torch.Tensor) else (v,)) if isinstance(n, SYMBOLIC)]
    if not numbers:
        return set()
    from torch.fx.experimental.symbolic_shapes import free_symbols

    return {symbol for number in numbers for symbol in free_symbols(number)}


def unbacked(value: object) -> bool:
    """Whether this is a symbolic number that nobody knows before the op has run."""
    if not isinstance(value, SYMBOLIC):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(value))


def new_environment() -> ShapeEnv:
    """Where symbols of its own live, for stand-ins of real tensors."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


def data_dependent(error: Exception) -> bool:
    """Whether torch raised this because code on stand-ins asked for a value."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return isinstance(error, (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode))
