"""What the fuzzer (tests/fuzz) found, each as small as it could be made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hopkit
from tests.recording import define_once, nodes, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
T = torch.linspace(0.5, 1.5, 3)


def slope(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: (y.sin() * y).sum())(x)


@pytest.mark.parametrize(
    "inside", [slope, torch.vmap(torch.sin), lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1]]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own decompositions
def test_a_subgraph_transforms_what_it_closes_over(inside: Callable[[Tensor], Tensor]) -> None:
    op = define_once()
    with pytest.warns(hopkit.HopkitWarning, match="applies a transform of torch.func to what it closes over"):
        graph = record(lambda x, t: op(lambda y: y * inside(t), x), X, T)
    same(graph(X + 1, T * 2), (X + 1) * inside(T * 2))


def test_a_subgraph_transforms_what_it_is_given() -> None:
    op = define_once()
    graph = record(lambda x: op(slope, x), T)
    assert nodes(graph, op) == 1
    same(graph(T * 2), slope(T * 2))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.jvp(f, (T,), (T,)),
        lambda f: torch.func.vjp(f, T)[1](T),  # type: ignore[misc] # torch's own
        lambda f: torch.vmap(f)(X),
        lambda f: torch.func.functionalize(f)(T),
    ],
)
def test_flatten_under_a_transform(transform: Callable[[Callable[[Tensor], Tensor]], object]) -> None:
    op = define_once()
    same(
        transform(lambda x: hopkit.flatten(record(lambda y: op(torch.sin, y), x))(x)),
        transform(torch.sin),
    )


def test_a_recorded_derivative_under_functionalize() -> None:
    op = define_once()
    graph = record(torch.func.grad(lambda x: op(torch.sin, x).sum()), T)
    assert nodes(graph, op) > 0
    same(torch.func.functionalize(graph)(T), T.cos())


def test_a_recorded_derivative_requires_a_gradient_where_the_body_does() -> None:
    op = define_once()
    unused = T.clone().requires_grad_()

    def slopes(x: Tensor, unused: Tensor) -> Tensor:
        return torch.func.grad(lambda y: op(lambda y, _: y.sin(), y, unused).sum())(x)

    graph = record(slopes, T, unused)
    assert not graph(T, unused).requires_grad
    assert graph(T.clone().requires_grad_(), unused).requires_grad
