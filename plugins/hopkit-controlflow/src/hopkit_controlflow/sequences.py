"""Pytrees of tensors that are gone along, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import torch

import hopkit
from hopkit.extend.body import flatten, map_leaves, sweep, unflatten

C = TypeVar("C")
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

    def swept(self, step: Callable[[C, X], tuple[C, Y]], carry: C, reverse: bool = False) -> tuple[C, Y]:
        """As `sweep`, in this dimension. What has too few of them is stacked in the first, as in torch.

        Of no slices there is ``carry``, and an empty result.
        """
        xs = [x.movedim(self.dim, 0) for x in self._xs] if self.length else self._beyond()
        last, ys = sweep(step, carry, self._like(xs), reverse=reverse)
        ys = ys if self.length else map_leaves(lambda y: cast("torch.Tensor", y)[:0], ys)
        return last if self.length else carry, map_leaves(self._placed, ys)

    def _placed(self, y: object) -> object:
        y = cast("torch.Tensor", y)
        return y.movedim(0, self.dim if self.dim < y.dim() else 0)

    def _beyond(self) -> list[torch.Tensor]:
        """Zeros in place of a slice, where there is none; what depends on them depends on ``xs``."""
        zeros = [x.new_zeros((*x.shape[: self.dim], 1, *x.shape[self.dim + 1 :])) for x in self._xs]
        pairs = zip(self._xs, zeros, strict=True)
        return [torch.cat(pair, self.dim).movedim(self.dim, 0) for pair in pairs]

    def room(self, y: Y) -> Y:
        """Without values, what `swept` stacks for steps that each give ``y``."""
        return map_leaves(self._room, y)

    def _room(self, leaf: object) -> object:
        y = torch.as_tensor(leaf)
        dim = self.dim if self.dim <= y.dim() else 0
        return y.new_empty((*y.shape[:dim], self.length, *y.shape[dim:]))


def _told(leaf: object) -> str:
    return f"of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
