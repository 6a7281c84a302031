"""``cond``: one of two functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

import hopkit
from hopkit.extend.body import choose, chosen, own
from hopkit_controlflow.agreement import agreed, alike, called, listed, predicate, shapes

NAME = "controlflow_cond"
OPERANDS = f"op '{NAME}' argument 'operands'"
PREDICATE = f"op '{NAME}' argument 'pred'"

Pred = torch.Tensor | float
T = TypeVar("T")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_cond`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    weight = torch.linspace(0.5, 1.5, 3, dtype=x.dtype).requires_grad_()
    tree = {"x": x, "pair": (x.t(), x + 1)}
    return [
        hopkit.Sample((torch.tensor(True), torch.sin, torch.cos, (x,)), name="yes"),
        hopkit.Sample((torch.tensor([-1.0]), lambda x: x * weight, lambda x: x, (x,)), name="captures"),
        hopkit.Sample(
            (
                torch.tensor(False),
                lambda t: {"a": t["x"], "b": (t["pair"][1].sum(),)},
                lambda t: {"a": t["pair"][0].t(), "b": (t["x"].mean(),)},
                (tree,),
            ),
            name="pytree",
        ),
    ]


def _abstract(pred: Pred, true_fn: Callable[..., T], false_fn: Callable[..., T], operands: Sequence[object] = ()) -> T:
    predicate(PREDICATE, pred)
    listed(OPERANDS, operands)
    return shapes(_both(true_fn, false_fn, operands)[0])


def _both(true_fn: Callable[..., T], false_fn: Callable[..., T], operands: Sequence[object]) -> tuple[T, T]:
    yes, no = called(NAME, "true_fn", true_fn, *operands), called(NAME, "false_fn", false_fn, *operands)
    return yes, alike(NAME, "false_fn", no, "'true_fn'", yes)


@hopkit.define(NAME, abstract=_abstract, samples=samples)
def cond(
    pred: Pred,
    true_fn: Callable[..., T],
    false_fn: Callable[..., T],
    operands: Sequence[object] = (),
) -> T:
    """``true_fn(*operands) if pred else false_fn(*operands)``.

    Args:
        pred: A bool, or a tensor of one element. Under vmap it may differ from item to item; both functions run then.
        true_fn: Gives a pytree of tensors.
        false_fn: Gives one of the same structure, shapes, dtypes and devices.
        operands: A tuple or list of pytrees of tensors. The functions may close over others.

    Raises:
        hopkit.CallError: ``pred`` has more than one element.
        hopkit.SubgraphError: The functions disagree in what they give, or write to ``operands``.
    """
    pred = predicate(PREDICATE, pred)
    listed(OPERANDS, operands)
    if isinstance(pred, torch.Tensor) and hopkit.batched(pred):
        return own(chosen(pred, *_both(true_fn, false_fn, operands)), operands)
    if isinstance(pred, torch.Tensor):
        agreed((true_fn, false_fn), operands, lambda: _both(true_fn, false_fn, operands))
    yes, no = functools.partial(called, NAME, "true_fn", true_fn), functools.partial(called, NAME, "false_fn", false_fn)
    return own(choose(pred, yes, no, operands), operands)
