"""Pytrees of tensors that are gone along, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import torch

import hopkit
from hopkit.extend.body import flatten, leaves, map_leaves, unflatten

X = TypeVar("X")
Y = TypeVar("Y")


class Along(Generic[X]):
    """``xs``, along ``dim``.

    Args:
        op: Whose argument it is.
        name: The argument.
        xs: A pytree of tensors, at least one.
        dim: As in torch, may be negative.

    Raises:
        hopkit.CallError: A leaf is no tensor or has no such dimension, or they are of different lengths.
    """

    def __init__(self, op: str, name: str, xs: X, dim: int = 0) -> None:
        self._leaves, self._tree = flatten(xs)
        wrong = [x for x in self._leaves if not isinstance(x, torch.Tensor) or not -x.dim() <= dim < x.dim()]
        self._xs = cast("list[torch.Tensor]", self._leaves)
        told = f"has the leaf {_told(wrong[0])}" if wrong else "" if self._leaves else "has no leaves"
        sizes = [] if told else [x.shape[dim] for x in self._xs]
        if any(size != sizes[0] for size in sizes):
            told = f"has leaves of the sizes {sizes}"
        if told:
            raise hopkit.CallError(
                f"op '{op}' argument '{name}'",
                told,
                why=f"every step takes a slice of each along dimension {dim}",
                todo="Pass a pytree of tensors of the same size there",
            )
        self.dim = dim % self._xs[0].dim()
        self.length = sizes[0]

    def example(self) -> X:
        """A slice without values, for a recording; there is one even of nothing."""
        return self._like([x.new_zeros((*x.shape[: self.dim], *x.shape[self.dim + 1 :])) for x in self._xs])

    def _like(self, parts: Sequence[torch.Tensor]) -> X:
        return cast("X", unflatten(parts, self._tree))

    def stacked(self, step: Callable[[X], Y], reverse: bool = False) -> Y:
        """What ``step`` gives for every slice, one after the other in this dimension.

        Where that has too few dimensions it is in the first, as in torch. Of no slices there is an empty result.
        """
        parts = [x.unbind(self.dim) for x in self._xs]
        order = range(self.length)
        ys = [step(self._like([part[i] for part in parts])) for i in (reversed(order) if reverse else order)]
        ys = ys[::-1] if reverse else ys
        _, tree = flatten(first := ys[0] if ys else step(self._beyond()))
        tensors = [list(map(torch.as_tensor, many)) for many in zip(*map(leaves, ys or [first]), strict=True)]
        stacks = [torch.stack(many, self._place(many[0])) for many in tensors]
        if not ys:
            stacks = [x.narrow(self._place(many[0]), 0, 0) for x, many in zip(stacks, tensors, strict=True)]
        return cast("Y", unflatten(stacks, tree))

    def _beyond(self) -> X:
        """Zeros in place of a slice, where there is none; what depends on them depends on ``xs``."""
        zeros = [x.new_zeros((*x.shape[: self.dim], 1, *x.shape[self.dim + 1 :])) for x in self._xs]
        pairs = zip(self._xs, zeros, strict=True)
        return self._like([torch.cat(pair, self.dim).select(self.dim, 0) for pair in pairs])

    def room(self, y: Y) -> Y:
        """Without values, what `stacked` gives for steps that each give ``y``."""
        return map_leaves(self._room, y)

    def _room(self, leaf: object) -> object:
        y = torch.as_tensor(leaf)
        dim = self._place(y)
        return y.new_empty((*y.shape[:dim], self.length, *y.shape[dim:]))

    def _place(self, y: torch.Tensor) -> int:
        return self.dim if self.dim <= y.dim() else 0


def _told(leaf: object) -> str:
    return f"of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
