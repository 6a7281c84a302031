"""``while_loop``: a state, changed for as long as a function of it says so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

import hopkit
from hopkit.extend.body import loop, own
from hopkit_controlflow.agreement import alike, called, listed, predicate, shapes, start

NAME = "controlflow_while_loop"
GOING = f"what subgraph 'cond_fn' of op '{NAME}' gives"
CARRIED = f"op '{NAME}' argument 'carried_inputs'"
START = "'carried_inputs' are"

T = TypeVar("T", bound="Sequence[object]")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_while_loop`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
    count = torch.tensor(0)
    return [
        hopkit.Sample((lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (count, x)), name="counted"),
        hopkit.Sample((lambda x: x.abs().sum() < 50, lambda x: [x * 2 + weight], [x.t().t()]), name="captures"),
        hopkit.Sample(
            (
                lambda s: s["n"].sum() < s["limit"],
                lambda s: ({"n": s["n"] + 1, "limit": s["limit"], "pair": (s["pair"][1], s["pair"][0] * weight)},),
                ({"n": torch.zeros(1), "limit": torch.tensor(3.0), "pair": (x, x + 1)},),
            ),
            name="pytree",
        ),
        hopkit.Sample((lambda x: x.sum() > 100, lambda x: (x * 2,), (x,)), name="no trips"),
    ]


def _abstract(cond_fn: Callable[..., object], body_fn: Callable[..., T], carried_inputs: T) -> T:
    state = start(listed(CARRIED, carried_inputs))
    _going(cond_fn, state)
    return shapes(_next(body_fn, state))


def _going(cond_fn: Callable[..., object], state: Sequence[object]) -> object:
    return predicate(GOING, called(NAME, "cond_fn", cond_fn, *state))


def _next(body_fn: Callable[..., object], state: T) -> T:
    return alike(NAME, "body_fn", cast("T", called(NAME, "body_fn", body_fn, *state)), START, state)


@hopkit.define(NAME, abstract=_abstract, samples=samples)
def while_loop(cond_fn: Callable[..., object], body_fn: Callable[..., T], carried_inputs: T) -> T:
    """``while cond_fn(*state): state = body_fn(*state)``, from ``carried_inputs`` on; gives the last state.

    Args:
        cond_fn: Gives a bool, or a tensor of one element. Under vmap it may differ from item to item: an item that is
            done stays as it is until all are.
        body_fn: Gives the next state: a tuple of the same structure, shapes, dtypes and devices.
        carried_inputs: A tuple or list of pytrees of tensors. A number in it becomes a tensor of no dimension.

    Raises:
        hopkit.CallError: ``cond_fn`` gives more than one element.
        hopkit.SubgraphError: A state is unlike the one before, or is written to.
    """
    state = start(listed(CARRIED, carried_inputs))
    return own(loop(functools.partial(_going, cond_fn), functools.partial(_next, body_fn), state), carried_inputs)
