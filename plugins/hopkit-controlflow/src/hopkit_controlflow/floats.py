"""The tensors of a pytree that have derivatives, and the vector that they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard, TypeVar, cast

import torch

import hopkit
from hopkit.extend.body import flatten, leaves, map_leaves, unflatten

T = TypeVar("T")

_SAME = object()


def is_float(leaf: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a tensor that has derivatives."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def split(value: T) -> tuple[list[torch.Tensor], Callable[..., T]]:
    """The tensors of a pytree that have derivatives, and ``fill(tensors)``, the pytree with others in their place.

    ``fill(tensors, rest=None)`` has None in place of all other leaves.
    """
    given, tree = flatten(value)
    found = {i: leaf for i, leaf in enumerate(given) if is_float(leaf)}

    def fill(tensors: Sequence[torch.Tensor], rest: object = _SAME) -> T:
        new = dict(zip(found, tensors, strict=True))
        return cast("T", unflatten([new.get(i, leaf if rest is _SAME else rest) for i, leaf in enumerate(given)], tree))

    return list(found.values()), fill


def unknown(who: str, value: T) -> tuple[list[torch.Tensor], Callable[..., T]]:
    """`split` of what is solved for, or is to be solved.

    Raises:
        hopkit.CallError: A part of it is no vector of the others' kind.
    """
    tensors, fill = split(value)
    if len(tensors) != len(leaves(value)) or len({(t.dtype, t.device) for t in tensors}) != 1:
        raise hopkit.CallError(
            who,
            f"is {shown(value)}",
            why="the solver takes all of it for one vector",
            todo="Let it be a pytree of floating-point tensors of one dtype, and close over the rest",
        )
    return tensors, fill


def ravel(value: object) -> torch.Tensor:
    """The tensors of a pytree as one vector."""
    return torch.cat([t.reshape(-1) for t in split(value)[0]])


def unravel(vector: torch.Tensor, like: T) -> T:
    """The pytree that is ``vector``."""
    tensors, fill = split(like)
    parts = vector.split([t.numel() for t in tensors])
    return fill([part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)])


def fitting(op: str, name: str, got: T, want: object) -> T:
    """``got``, which subgraph ``name`` of a solver gives, if it is of the structure, shapes and dtypes of ``want``.

    Raises:
        hopkit.SubgraphError: It is not.
    """
    if (found := shown(got)) != (wanted := shown(want)):
        raise hopkit.SubgraphError(
            f"subgraph '{name}' of op '{op}'",
            f"gives {found} for {wanted}",
            why="what is solved for and what comes out of it are vectors of one space",
            todo="Let it give what it takes: the same structure, shapes, dtypes and devices",
        )
    return got


def shown(value: object) -> str:
    """A pytree, with the kinds of its tensors."""
    return str(map_leaves(lambda leaf: _Kind(leaf) if isinstance(leaf, torch.Tensor) else leaf, value))


class _Kind:
    def __init__(self, tensor: torch.Tensor) -> None:
        place = "" if tensor.device.type == "cpu" else f"@{tensor.device}"
        self._text = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}{place}"

    def __repr__(self) -> str:
        return self._text
