"""``map``: a function of every slice, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

import hopkit
from hopkit.extend.body import own
from hopkit_controlflow.agreement import called
from hopkit_controlflow.sequences import Along

NAME = "controlflow_map"

X = TypeVar("X")
A = TypeVar("A")
Y = TypeVar("Y")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_map`` makes."""
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    weight = torch.linspace(-0.5, 0.5, 9).reshape(3, 3).requires_grad_()
    return [
        hopkit.Sample((torch.sin, x), name="sin"),
        hopkit.Sample((lambda x, y: x @ weight + y.sum(), x, x + 1), name="captures"),
        hopkit.Sample(
            (
                lambda t, by: {"a": t["x"] * by[0], "b": (t["y"].sum(),)},
                {"x": x, "y": x.t()[:, :1].expand(3, 4).t()},
                (x,),
            ),
            name="pytree",
        ),
        hopkit.Sample((lambda x: x.sum(), x[:0]), name="no steps"),
    ]


def _abstract(f: Callable[..., Y], xs: X, *args: A) -> Y:
    along = Along(NAME, "xs", xs)
    return along.room(called(NAME, "f", f, along.example(), *args))


@hopkit.define(NAME, abstract=_abstract, samples=samples)
def map(f: Callable[..., Y], xs: X, *args: A) -> Y:
    """``f(x, *args)`` for every slice ``x`` of ``xs`` along the first dimension, stacked there.

    Args:
        f: Gives a pytree of tensors.
        xs: A pytree of tensors of the same size in the first dimension. No slices: an empty result.
        args: Pytrees of tensors that every step gets as they are.

    Raises:
        hopkit.CallError: ``xs`` are of different lengths, or a tensor of it has no dimension.
        hopkit.SubgraphError: ``f`` writes to what it is given.
    """
    ys = Along(NAME, "xs", xs).swept(lambda _, x: (None, called(NAME, "f", f, x, *args)), None)[1]
    return own(ys, [xs, *args])
