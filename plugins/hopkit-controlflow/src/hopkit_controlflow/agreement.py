"""What branches and carried states have to agree on, and the errors that say so."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

import hopkit
from hopkit.extend.body import flatten, is_recorded, leaves, map_leaves, on_stand_ins, versions

T = TypeVar("T")


def listed(who: str, value: T) -> T:
    """``value``, which is passed as several arguments.

    Raises:
        hopkit.CallError: It is no tuple or list.
    """
    if not isinstance(value, (tuple, list)):
        raise hopkit.CallError(
            who, f"expected a tuple, got {told(value)}", why="each of it is an argument", todo="Write `(x,)` for one"
        )
    return value


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
    return cast("T", value.reshape(())) if value.dim() else value


def alike(op: str, name: str, got: T, other: str, want: object) -> T:
    """``got``, which subgraph ``name`` gives, if it is as ``want``, which is said to be ``other``.

    Raises:
        hopkit.SubgraphError: They differ in structure, or in a leaf's shape, dtype or device.
    """
    (found, tree), (wanted, wanted_tree) = flatten(got), flatten(want)
    if tree != wanted_tree:
        differ: tuple[str, str] | None = (_shown(got), _shown(want))
    else:
        differ = next(((told(a), told(b)) for a, b in zip(found, wanted, strict=True) if kind(a) != kind(b)), None)
    if differ is not None:
        raise hopkit.SubgraphError(
            f"subgraph '{name}' of op '{op}'",
            f"gives {differ[0]}, and {other} {differ[1]}",
            why="a graph is made before anyone knows which of them it is",
            todo="Let both have the same structure, shapes, dtypes and devices: convert or expand one of them",
        )
    return got


def kind(leaf: object) -> object:
    """What has to be equal of two leaves."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def told(leaf: object) -> str:
    """A leaf, for messages."""
    if not isinstance(leaf, torch.Tensor):
        return f"the {type(leaf).__name__} {leaf}"
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"


def _shown(value: object) -> str:
    return f"the structure {map_leaves(lambda _: '*', value)}".replace("'*'", "*")


def agreed(functions: Sequence[Callable[..., object]], operands: Sequence[object], both: Callable[[], object]) -> None:
    """In plain eager, where one of ``functions`` is going to run, check that they agree: once for their code.

    Raises:
        hopkit.SubgraphError: As ``both`` does, which calls all of them on ``operands``.
    """
    if all(map(is_recorded, functions)):
        return
    key = (*map(_code, functions), *map(kind, leaves(list(operands))))
    try:
        if key in _agreed:
            return
        on_stand_ins(both)
    except hopkit.SubgraphError:
        raise
    except Exception:  # it needs values, or is wrong in itself: if it is the one that runs, it says so
        return  # nor is this plain eager, where sizes are symbols: they cannot be looked up
    if len(_agreed) >= MOST_AGREED:
        _agreed.clear()
    _agreed.add(key)


_agreed: set[object] = set()
MOST_AGREED = 4096  # and then they are looked at again


def _code(function: Callable[..., object]) -> object:
    try:
        return getattr(function, "__code__", None) or weakref.ref(function)
    except TypeError:  # one of C's, which stays
        return function


def start(carry: T) -> T:
    """A state to begin with. A number becomes a tensor: one graph is for all of its values.

    A tensor that is there twice becomes two, for after a step it is.
    """
    seen: list[object] = []

    def first(leaf: object) -> object:
        leaf = number(leaf)
        if isinstance(leaf, torch.Tensor) and any(leaf is other for other in seen):
            return leaf.view_as(leaf)
        seen.append(leaf)
        return leaf

    return map_leaves(first, carry)


def number(value: object) -> object:
    """``value``, as a tensor of no dimension if it is a number, which may be known only when it runs."""
    if isinstance(value, torch.SymInt):
        return torch.scalar_tensor(cast("int", value), dtype=torch.int64)
    return torch.tensor(value) if isinstance(value, (int, float)) else value


def called(op: str, name: str, function: Callable[..., T], *args: object) -> T:
    """``function(*args)``.

    Raises:
        hopkit.SubgraphError: It writes to what it is given.
    """
    if is_recorded(function):
        return function(*args)
    given = leaves(args)
    before = versions(given)
    result = function(*args)
    if versions(given) != before:
        raise hopkit.SubgraphError(
            f"subgraph '{name}' of op '{op}'",
            "writes to what it is given",
            why="that is the caller's own tensor, or the state of the step before",
            todo="Write to a copy: `x = x.clone()`",
        )
    return result


def shapes(result: T) -> T:
    """``result`` of a subgraph on stand-ins, as the op would give it: new, and contiguous."""
    return map_leaves(lambda t: t.new_empty(t.shape) if isinstance(t, torch.Tensor) else t, result)
