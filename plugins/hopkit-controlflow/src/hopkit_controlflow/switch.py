"""``switch``: one of several functions."""

from __future__ import annotations

from typing import TypeVar

import torch

import hopkit
from hopkit.extend.body import own
from hopkit_controlflow.agreement import alike, chosen, predicate, shapes

NAME = "controlflow_switch"
INDEX = f"op '{NAME}' argument 'index'"

Index = torch.Tensor | int | torch.SymInt
T = TypeVar("T")
A = TypeVar("A")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_switch`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
    branches = (torch.sin, lambda x: x * weight, torch.Tensor.exp)
    tree = {"x": x, "pair": (x.t(), x + 1)}
    return [
        hopkit.Sample((torch.tensor(1), branches, x), name="captures"),
        hopkit.Sample((torch.tensor([7]), branches, x), name="above"),
        hopkit.Sample((-2, branches, x), name="below"),
        hopkit.Sample(
            (torch.tensor(1), (lambda t: {"a": t["x"].sum()}, lambda t: {"a": t["pair"][0].mean()}), tree),
            name="pytree",
        ),
    ]


def _agreed(branches: tuple[hopkit.Subgraph[T], ...], operands: tuple[object, ...]) -> list[T]:
    first = branches[0](*operands)
    others = enumerate(branches[1:], start=1)
    return [first, *(alike(NAME, f"branches[{i}]", f(*operands), "'branches[0]'", first) for i, f in others)]


def _none(branches: tuple[hopkit.Subgraph[T], ...]) -> None:
    if not branches:
        raise hopkit.CallError(
            f"op '{NAME}' argument 'branches'", "is empty", why="there is nothing to choose", todo="Pass a function"
        )


def _shapes(index: Index, branches: tuple[hopkit.Subgraph[T], ...], *operands: object) -> T:
    predicate(INDEX, index)
    _none(branches)
    return shapes(_agreed(branches, operands)[0])


@hopkit.define(
    NAME, inputs=lambda index, branches, *operands: (operands,) * len(branches), outputs=_shapes, samples=samples
)
def switch(index: Index, branches: tuple[hopkit.Subgraph[T], ...], *operands: A) -> T:
    """``branches[index](*operands)``; an index that is too small or too large is the first or the last.

    Args:
        index: A number, or a tensor of one element. Under vmap it may differ from item to item; all branches run then.
        branches: At least one. Each gives a pytree of tensors of the same structure, shapes, dtypes and devices.
        operands: Pytrees of tensors. The functions may close over others.

    Raises:
        hopkit.CallError: ``index`` has more than one element, or there is no branch.
        hopkit.SubgraphError: The branches disagree in what they give.
    """
    _none(branches)
    index = predicate(INDEX, index)
    last = len(branches) - 1
    if isinstance(index, torch.Tensor) and hopkit.batched(index):
        found, *others = _agreed(branches, operands)
        for i, other in enumerate(others, start=1):
            found = chosen(index >= i, other, found)
        return own(found, operands)
    return own(branches[max(0, min(int(index), last))](*operands), operands)
