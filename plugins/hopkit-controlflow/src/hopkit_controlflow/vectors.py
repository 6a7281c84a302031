"""What solvers share: pytrees as vectors, and how a solver ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

import hopkit
from hopkit.extend.body import flatten, leaves, map_leaves, split
from hopkit_controlflow.agreement import kind, told

T = TypeVar("T")


class Status(NamedTuple):
    """How a solver ended: per item, if there are several."""

    converged: torch.Tensor
    iterations: torch.Tensor


def checked(who: str, status: Status, *, must: bool) -> Status:
    """``status``.

    Raises:
        hopkit.HopkitError: A solver that must converge did not.
    """
    if must and hopkit.anywhere(~status.converged):
        raise hopkit.HopkitError(
            who,
            "did not converge",
            why="what it gives is no solution, and a derivative by it would be wrong",
            todo="Allow more `iterations` or a larger `tolerance`, and look at the status of the call that is derived",
        )
    return status


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
    (found, tree), (wanted, wanted_tree) = flatten(got), flatten(want)
    if tree != wanted_tree or list(map(kind, found)) != list(map(kind, wanted)):
        raise hopkit.SubgraphError(
            f"subgraph '{name}' of op '{op}'",
            f"gives {shown(got)} for {shown(want)}",
            why="what is solved for and what comes out of it are vectors of one space",
            todo="Let it give what it takes: the same structure, shapes, dtypes and devices",
        )
    return got


def shown(value: object) -> str:
    """A pytree, with the kinds of its tensors."""
    return str(map_leaves(told, value)).replace("'", "")
