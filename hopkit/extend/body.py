"""For bodies that take pytrees apart, decide on values or carry a state: what an op needs besides its subgraphs.

All of it means the same in every mode. `hopkit.batched` and `hopkit.anywhere` belong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from hopkit._torch import levels
from hopkit._torch.autograd import versions
from hopkit._torch.checkpoint import computed_again
from hopkit._torch.functional import memory
from hopkit._torch.trees import Tree, flatten, leaves, map_leaves, unflatten

__all__ = ["Tree", "computed_again", "flatten", "leaves", "map_leaves", "own", "unflatten", "versions"]

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


def _memory(tensor: torch.Tensor) -> object:
    found = memory(levels.base(tensor))
    return id(tensor) if found is None else found
