"""``switch``: one of several functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

import hopkit
from hopkit.extend.body import choose, chosen, own
from hopkit_controlflow.agreement import agreed, alike, called, predicate, shapes

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


def _all(branches: tuple[Callable[..., T], ...], operands: tuple[object, ...]) -> list[T]:
    first, *others = [called(NAME, f"branches[{i}]", f, *operands) for i, f in enumerate(branches)]
    return [first, *(alike(NAME, f"branches[{i}]", y, "'branches[0]'", first) for i, y in enumerate(others, start=1))]


def _none(branches: tuple[Callable[..., T], ...]) -> None:
    if not branches:
        raise hopkit.CallError(
            f"op '{NAME}' argument 'branches'", "is empty", why="there is nothing to choose", todo="Pass a function"
        )


def _abstract(index: Index, branches: tuple[Callable[..., T], ...], *operands: A) -> T:
    predicate(INDEX, index)
    _none(branches)
    return shapes(_all(branches, operands)[0])


@hopkit.define(NAME, abstract=_abstract, samples=samples)
def switch(index: Index, branches: tuple[Callable[..., T], ...], *operands: A) -> T:
    """``branches[index](*operands)``; an index that is too small or too large is the first or the last.

    Args:
        index: A number, or a tensor of one element. Under vmap it may differ from item to item; all branches run then.
        branches: At least one. Each gives a pytree of tensors of the same structure, shapes, dtypes and devices.
        operands: Pytrees of tensors. The functions may close over others.

    Raises:
        hopkit.CallError: ``index`` has more than one element, or there is no branch.
        hopkit.SubgraphError: The branches disagree in what they give, or write to ``operands``.
    """
    _none(branches)
    index = predicate(INDEX, index)
    if isinstance(index, torch.Tensor) and hopkit.batched(index):
        found, *others = _all(branches, operands)
        for i, other in enumerate(others, start=1):
            found = chosen(index >= i, other, found)
        return own(found, operands)
    if isinstance(index, torch.Tensor):
        agreed(branches, operands, lambda: _all(branches, operands))
    return own(_from(0, index, branches, operands), operands)


def _from(i: int, index: Index, branches: tuple[Callable[..., T], ...], operands: Sequence[object]) -> T:
    def this(*operands: object) -> T:
        return called(NAME, f"branches[{i}]", branches[i], *operands)

    if i == len(branches) - 1:
        return this(*operands)
    return choose(index <= i, this, lambda *operands: _from(i + 1, index, branches, operands), operands)
