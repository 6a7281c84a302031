"""Subgraphs that compile something themselves: ``torch.cond``, ``torch.while_loop``, a compiled function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hopkit import HopkitWarning
from tests.recording import define_once, define_twice, nodes, plainly, record, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
]

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
W = torch.linspace(0.5, 1.5, 4)

Function = Callable[[Tensor], Tensor]


def chosen(y: Tensor) -> Tensor:
    return torch.cond(y.sum() > 0, lambda a: a.sin() * W, lambda a: a.cos() - W, (y,))  # type: ignore[no-any-return] # torch's


def counted(y: Tensor) -> Tensor:
    start = torch.zeros((), dtype=torch.int64)
    return torch.while_loop(lambda i, a: i < 3, lambda i, a: (i + 1, a * W), (start, y))[1]  # type: ignore[no-any-return] # torch's


SUBGRAPHS: dict[str, Function] = {"cond": chosen, "loop": counted}


@pytest.mark.parametrize("kind", SUBGRAPHS)
def test_recorded_in_place_and_in_eager_afterwards(kind: str) -> None:
    twice, subgraph = define_twice(), SUBGRAPHS[kind]

    def function(x: Tensor) -> Tensor:
        return twice(subgraph, x)

    want = [subgraph(subgraph(x)) for x in (X, -X)]
    with pytest.warns(HopkitWarning, match="'t_twice' is not kept.*on functions, which torch compiles"):
        graph = record(function, X)
    assert nodes(graph, twice) == 0
    for x, expected in zip((X, -X), want, strict=True):
        same(graph(x), expected)
        same(function(x), expected)
        same(subgraph(subgraph(x)), expected)  # and Dynamo reads it as before


def test_a_compiled_op_keeps_it_inside() -> None:
    once, w = define_once(), W.clone().requires_grad_()

    def function(x: Tensor) -> Tensor:
        return once(lambda y: torch.cond(y.sum() > 0, lambda a: a.sin() * w, lambda a: a.cos() - w, (y,)), x)

    for x in (X + 1, X - 1):
        torch.compile(function, backend="aot_eager", fullgraph=True)(x).sum().backward()
        got, w.grad = w.grad, None
        (x.sin() * w if x.sum() > 0 else x.cos() - w).sum().backward()
        same(got, w.grad)
        w.grad = None


def test_in_training_and_exported() -> None:
    once = define_once()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return once(chosen, x)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return once(lambda y: torch.cond(y.sum() > 0, lambda a: a.sin() * w, lambda a: a.cos() - w, (y,)), x)

    step, x, w = trained(function), (X + 1).requires_grad_(), W.clone().requires_grad_()
    with pytest.warns(HopkitWarning, match="on functions, which torch compiles"):
        graph = record(step, x, w)
    same(graph(x, w), plainly(step, x, w))
    with pytest.warns(HopkitWarning, match="on functions, which torch compiles"):
        program = torch.export.export(Model(), (X,), strict=False)
    for x in (X, -X):
        same(program.module()(x), chosen(x))
