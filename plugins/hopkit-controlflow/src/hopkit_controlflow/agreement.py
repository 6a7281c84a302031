"""What branches and carried states have to agree on, and the errors that say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch

import hopkit
from hopkit.extend.body import flatten, leaves, map_leaves, unflatten, versions

T = TypeVar("T")


def predicate(who: str, value: T) -> T:
    """``value``, as something that decides, in no dimension.

    Raises:
        hopkit.CallError: It has more than one element, or none.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise hopkit.CallError(
            who,
            f"is a tensor of shape {tuple(value.shape)}",
            why="one way is gone, so one element decides",
            todo="Reduce it, such as by `.all()` or `.any()`; to choose for each element, use torch.where",
        )
    return cast("T", value.reshape(()))


def alike(op: str, name: str, got: T, other: str, want: object) -> T:
    """``got``, which subgraph ``name`` gives, if it is as ``want``, which is said to be ``other``.

    Raises:
        hopkit.SubgraphError: They differ in structure, or in a leaf's shape, dtype or device.
    """
    (found, tree), (wanted, wanted_tree) = flatten(got), flatten(want)
    pairs = zip(map(_told, found), map(_told, wanted), strict=False)
    differ = next(((a, b) for a, b in pairs if a != b), None)
    if tree != wanted_tree:
        differ = _shown(got), _shown(want)
    if differ is not None:
        raise hopkit.SubgraphError(
            f"subgraph '{name}' of op '{op}'",
            f"gives {differ[0]}, and {other} {differ[1]}",
            why="a graph is made before anyone knows which of them it is",
            todo="Let both have the same structure, shapes, dtypes and devices: convert or expand one of them",
        )
    return got


def _told(leaf: object) -> str:
    if not isinstance(leaf, torch.Tensor):
        return f"the {type(leaf).__name__} {leaf}"
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"


def _shown(value: object) -> str:
    return f"the structure {map_leaves(lambda _: '*', value)}".replace("'*'", "*")


def chosen(decides: torch.Tensor, yes: T, no: T) -> T:
    """For every item of a batch, ``yes`` or ``no``, which are alike."""
    left, tree = flatten(yes)
    pairs = zip(left, leaves(no), strict=True)
    return cast("T", unflatten([torch.where(decides != 0, a, b) if a is not b else a for a, b in pairs], tree))  # type: ignore[call-overload]


def start(carry: T) -> T:
    """A state to begin with. A number becomes a tensor: one graph is for all of its values."""
    return map_leaves(lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, (int, float)) else leaf, carry)


def unwritten(who: str, tensors: Sequence[object], before: Sequence[int]) -> None:
    """Check that nobody has written to ``tensors`` since `versions` of them were ``before``.

    Raises:
        hopkit.SubgraphError: Somebody has.
    """
    if versions(tensors) != list(before):
        raise hopkit.SubgraphError(
            who,
            "writes to what it is given",
            why="that is the state of the step before, or the caller's own tensor",
            todo="Write to a copy: `state = state.clone()`",
        )


def shapes(result: T) -> T:
    """``result`` of a subgraph on stand-ins, as the op would give it: new, and contiguous."""
    return map_leaves(lambda t: t.new_empty(t.shape) if isinstance(t, torch.Tensor) else t, result)
