"""For bodies that take pytrees apart, decide on values or carry a state: what an op needs besides its subgraphs.

All of it means the same in every mode. `hopkit.batched` and `hopkit.anywhere` belong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from hopkit._torch import levels
from hopkit._torch.autograd import versions
from hopkit._torch.fakes import Stage
from hopkit._torch.functional import memory
from hopkit._torch.trees import Tree, flatten, leaves, map_leaves, unflatten
from hopkit._torch.watch import Substitute
from hopkit.transform import Replayed

__all__ = [
    "Tree",
    "flatten",
    "is_recorded",
    "leaves",
    "map_leaves",
    "on_stand_ins",
    "own",
    "unflatten",
    "versions",
]

T = TypeVar("T")


def own(result: T, inputs: Sequence[object]) -> T:
    """``result``, contiguous, with a copy of every tensor that shares memory with an input or with another output.

    A graph is made before it is known which way an op goes. What comes out must be of one layout, and be the op's own,
    whichever way that is.

    Args:
        result: A pytree of tensors.
        inputs: Pytrees of what it may share memory with.
    """
    taken = {_memory(leaf) for leaf in leaves(list(inputs)) if isinstance(leaf, torch.Tensor)}

    def owned(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.contiguous()
        if _memory(leaf) in taken:
            leaf = leaf.clone(memory_format=torch.contiguous_format)
        taken.add(_memory(leaf))
        return leaf

    return map_leaves(owned, result)


def is_recorded(subgraph: Callable[..., object]) -> bool:
    """Whether what a body got for a subgraph is a graph, for which all was checked when it was recorded."""
    return isinstance(subgraph, Replayed)


def on_stand_ins(function: Callable[[], T]) -> T:
    """``function()`` with stand-ins in place of tensors from outside: shapes; nothing is computed, written or drawn.

    Raises:
        Exception: What ``function`` raises, which may need values.
    """
    stage = Stage([])

    def stand_in(value: object) -> object:
        return stage.fake(value) if isinstance(value, torch.Tensor) and not stage.owns(value) else value

    with stage.open(), Substitute(stand_in) as mode:
        return mode.replaced(function())


def _memory(tensor: torch.Tensor) -> object:
    found = memory(levels.base(tensor))
    return id(tensor) if found is None else found
