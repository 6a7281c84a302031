"""``cond``: one of two functions."""

from __future__ import annotations

from typing import TypeVar

import torch

import hopkit
from hopkit.extend.body import own
from hopkit_controlflow.agreement import alike, chosen, predicate, shapes

NAME = "controlflow_cond"
PREDICATE = f"op '{NAME}' argument 'pred'"

Pred = torch.Tensor | bool
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


def _shapes(
    pred: Pred, true_fn: hopkit.Subgraph[T], false_fn: hopkit.Subgraph[T], operands: tuple[object, ...] = ()
) -> T:
    predicate(PREDICATE, pred)
    yes = true_fn(*operands)
    return shapes(alike(NAME, "false_fn", false_fn(*operands), "'true_fn'", yes))


@hopkit.define(
    NAME, inputs=lambda pred, true_fn, false_fn, operands=(): (operands, operands), outputs=_shapes, samples=samples
)
def cond(
    pred: Pred,
    true_fn: hopkit.Subgraph[T],
    false_fn: hopkit.Subgraph[T],
    operands: tuple[object, ...] = (),
) -> T:
    """``true_fn(*operands) if pred else false_fn(*operands)``.

    Args:
        pred: A bool, or a tensor of one element. Under vmap it may differ from item to item; both functions run then.
        true_fn: Gives a pytree of tensors.
        false_fn: Gives one of the same structure, shapes, dtypes and devices.
        operands: A tuple or list of pytrees of tensors. The functions may close over others.

    Raises:
        hopkit.CallError: ``pred`` has more than one element.
        hopkit.SubgraphError: The functions disagree in what they give.
    """
    pred = predicate(PREDICATE, pred)
    if isinstance(pred, torch.Tensor) and hopkit.batched(pred):
        yes = true_fn(*operands)
        return own(chosen(pred, yes, alike(NAME, "false_fn", false_fn(*operands), "'true_fn'", yes)), operands)
    return own(true_fn(*operands) if pred else false_fn(*operands), operands)
