"""``fori_loop``: a state, changed a number of times that may be known only when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

import hopkit
from hopkit.extend.body import loop, own
from hopkit_controlflow.agreement import alike, called, number, predicate, shapes, start

NAME = "controlflow_fori_loop"
START = "'init_val' is"

Bound = torch.Tensor | int | torch.SymInt
T = TypeVar("T")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_fori_loop`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
    return [
        hopkit.Sample((0, 3, lambda i, x: x.sin() + i, x), name="numbers"),
        hopkit.Sample((torch.tensor(1), torch.tensor([4]), lambda i, x: x * weight, x), name="captures"),
        hopkit.Sample(
            (torch.tensor(0), 2, lambda i, s: {"a": s["b"][0] * i, "b": (s["a"],)}, {"a": x, "b": (x + 1,)}),
            name="pytree",
        ),
        hopkit.Sample((5, torch.tensor(2), lambda i, x: x * 2, x), name="no trips"),
    ]


def _first(lower: Bound, upper: Bound) -> tuple[torch.Tensor, torch.Tensor]:
    return _bound("lower", lower), _bound("upper", upper)


def _bound(name: str, value: Bound) -> torch.Tensor:
    who = f"op '{NAME}' argument '{name}'"
    found = predicate(who, cast("torch.Tensor", number(value)))
    if found.is_floating_point() or found.is_complex():
        raise hopkit.CallError(who, f"is of {found.dtype}", why="steps are counted", todo="Pass an integer")
    return found.long()


def _abstract(lower: Bound, upper: Bound, body_fun: Callable[..., T], init_val: T) -> T:
    return shapes(_next(body_fun, _first(lower, upper)[0], start(init_val)))


def _next(body_fun: Callable[..., T], i: torch.Tensor, state: T) -> T:
    return alike(NAME, "body_fun", called(NAME, "body_fun", body_fun, i, state), START, state)


@hopkit.define(NAME, abstract=_abstract, samples=samples)
def fori_loop(lower: Bound, upper: Bound, body_fun: Callable[..., T], init_val: T) -> T:
    """``for i in range(lower, upper): state = body_fun(i, state)``, from ``init_val`` on; gives the last state.

    Args:
        lower: The first ``i``, a number or a tensor of one element.
        upper: Where to stop. Not above ``lower``: there are no trips, and ``init_val`` is given. Under vmap, both may
            differ from item to item.
        body_fun: Gives the next state, a pytree of the same structure, shapes, dtypes and devices. Its ``i`` is a
            tensor of no dimension.
        init_val: A pytree of tensors. A number in it becomes a tensor of no dimension.

    Raises:
        hopkit.CallError: A bound has more than one element.
        hopkit.SubgraphError: A state is unlike the one before, or is written to.
    """
    i, end = _first(lower, upper)

    def step(state: tuple[torch.Tensor, T]) -> tuple[torch.Tensor, T]:
        return state[0] + 1, _next(body_fun, *state)

    return own(loop(lambda state: state[0] < end, step, (i, start(init_val)))[1], [init_val])
