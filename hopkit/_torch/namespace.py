"""torch.ops.higher_order: an operator that it does not have may be one of a plugin that nobody has needed yet.

torch looks there for the operators of a program that is loaded, or of a graph that is unpickled. Nothing is asked where
the attribute is there. (torch/_ops.py, seen in 2.13 and 2.14. If it is gone, a plugin's package has to be imported
before its ops are looked up.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, _HigherOrderNamespace

_find: Callable[[], None] = lambda: None  # noqa: E731 # until `watch`


class _Namespace(_HigherOrderNamespace):
    def __getattr__(self, name: str) -> HigherOrderOperator:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # Python's own, such as __path__; no op has such a name
                raise
        _find()
        return super().__getattr__(name)


def watch(find: Callable[[], None]) -> None:
    """Let ``find`` be called before an operator is said to be missing. It brings all there are."""
    global _find
    _find = find
    torch.ops.higher_order.__class__ = _Namespace


def in_tree(name: str) -> Callable[..., Any]:
    """One of torch's own control-flow functions, such as ``scan``; for tests and benchmarks."""
    from torch import _higher_order_ops

    return getattr(_higher_order_ops, name)  # type: ignore[no-any-return] # torch's


def has(name: str) -> bool:
    """Whether there is such an operator, or a plugin brings one."""
    return hasattr(torch.ops.higher_order, name)
