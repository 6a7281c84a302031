"""The tensors of a pytree that have derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard, TypeVar, cast

import torch

from hopkit.extend.body import flatten, unflatten

T = TypeVar("T")

_SAME = object()


def is_float(leaf: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a tensor that has derivatives."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def split(value: T) -> tuple[list[torch.Tensor], Callable[..., T]]:
    """The tensors of a pytree that have derivatives, and ``fill(tensors)``, the pytree with others in their place.

    ``fill(tensors, rest=None)`` has None in place of all other leaves.
    """
    leaves, tree = flatten(value)
    found = {i: leaf for i, leaf in enumerate(leaves) if is_float(leaf)}

    def fill(tensors: Sequence[torch.Tensor], rest: object = _SAME) -> T:
        new = dict(zip(found, tensors, strict=True))
        return cast(
            "T", unflatten([new.get(i, leaf if rest is _SAME else rest) for i, leaf in enumerate(leaves)], tree)
        )

    return list(found.values()), fill
