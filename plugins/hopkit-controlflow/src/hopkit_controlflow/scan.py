"""``scan``: a state that goes along a sequence, and what it gives at every step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

import hopkit
from hopkit.extend.body import own
from hopkit_controlflow.agreement import alike, called, shapes, start
from hopkit_controlflow.sequences import Along

NAME = "controlflow_scan"
START = "'init' is"

C = TypeVar("C")
X = TypeVar("X")
Y = TypeVar("Y")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_scan`` makes."""
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    weight = torch.linspace(-0.5, 0.5, 9).reshape(3, 3).requires_grad_()

    def lstm(state: tuple[torch.Tensor, torch.Tensor], x: dict[str, torch.Tensor]) -> tuple[object, object]:
        h, c = state
        c = c * torch.sigmoid(x["gate"]) + torch.tanh(h @ weight)
        h = torch.tanh(c) * x["gate"]
        return (h, c), {"h": h, "norm": (c.square().sum(),)}

    state = (torch.zeros(3), torch.ones(3))
    return [
        hopkit.Sample((lambda c, x: (c + x, c * x), torch.zeros(3), x), name="sums"),
        hopkit.Sample((lambda c, x: (c * x, c), torch.ones(4), x), {"dim": 1, "reverse": True}, "along 1"),
        hopkit.Sample((lstm, state, {"gate": x}), name="pytree"),
        hopkit.Sample((lambda c, x: (c + x, c * x), torch.zeros(3), x[:0]), name="no steps"),
    ]


def _abstract(
    combine_fn: Callable[..., tuple[C, Y]], init: C, xs: X, *, dim: int = 0, reverse: bool = False
) -> tuple[C, Y]:
    along = Along(NAME, "xs", xs, dim)
    carry, y = _next(combine_fn, start(init), along.example())
    return shapes(carry), along.room(y)


def _next(combine_fn: Callable[..., tuple[C, Y]], carry: C, x: X) -> tuple[C, Y]:
    given: object = called(NAME, "combine_fn", combine_fn, carry, x)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise hopkit.SubgraphError(
            f"subgraph 'combine_fn' of op '{NAME}'",
            f"gives {given!r}",
            why="a step gives the next carry, and what is stacked",
            todo="Return two things: `return carry, y`",
        )
    following, y = given
    return alike(NAME, "combine_fn", following, START, carry), y


@hopkit.define(NAME, abstract=_abstract, samples=samples)
def scan(combine_fn: Callable[..., tuple[C, Y]], init: C, xs: X, *, dim: int = 0, reverse: bool = False) -> tuple[C, Y]:
    """``carry, y = combine_fn(carry, x)`` for every slice ``x`` of ``xs``; gives the last carry, and all ``y`` stacked.

    Args:
        combine_fn: Gives a pair: the next carry, which is like ``init``, and any pytree of tensors.
        init: The first carry, a pytree of tensors.
        xs: A pytree of tensors of the same size along ``dim``. No slices: ``init``, and an empty ``y``.
        dim: The dimension that is gone along. What is given at every step is stacked along it.
        reverse: From the last slice to the first. Each ``y`` is still where its ``x`` was.

    Raises:
        hopkit.CallError: ``xs`` are of different lengths, or have no such dimension.
        hopkit.SubgraphError: A carry is unlike the one before, or is written to.
    """
    along = Along(NAME, "xs", xs, dim)
    return own(along.swept(functools.partial(_next, combine_fn), start(init), reverse), [init, xs])
