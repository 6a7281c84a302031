"""What the fuzzer (tests/fuzz) found, each as small as it could be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import hopkit
from hopkit import Subgraph
from tests.recording import define_once, nodes, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
T = torch.linspace(0.5, 1.5, 3)


def slope(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: (y.sin() * y).sum())(x)


@pytest.mark.parametrize(
    "inside", [slope, torch.vmap(torch.sin)]
)
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


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own decompositions
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


def test_a_derivative_is_recorded_twice_and_differentiated() -> None:
    # What autograd saves of tanh was taken for a detached part, and the second recording lost the derivative.
    op = define_once()
    leaf = T.clone().requires_grad_()
    once = make_fx(torch.func.grad(lambda x: op(torch.tanh, x).sum()))(leaf)
    twice = make_fx(once)(leaf)
    assert nodes(twice, op) == nodes(once, op) == 2
    wanted = torch.autograd.grad(torch.func.grad(lambda x: x.tanh().sum())(leaf).sum(), leaf)
    same(torch.autograd.grad(twice(leaf).sum(), leaf), wanted)


def test_outputs_that_depend_on_nothing_that_requires_a_gradient() -> None:
    @hopkit.define("t_parts")
    def parts(body: Subgraph, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return body(x), y + 1

    leaf = T.clone().requires_grad_()
    with Whole():  # type: ignore[no-untyped-call] # torch's own
        first, second = parts(torch.sin, leaf, T)
    assert first.requires_grad
    assert not second.requires_grad


class Whole(TorchDispatchMode):
    """Takes operators whole."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own decompositions
def test_jvp_of_an_output_that_is_expanded() -> None:
    op = define_once()

    def run(x: Tensor) -> object:
        return torch.func.jvp(lambda x: op(lambda x, y: (x * y).sum(0).expand(4, 3), x, X), (x,), (x * 2,))

    (value, tangent), plain = record(run, T)(T), (T * X).sum(0).expand(4, 3)
    same((value, tangent), (plain, 2 * plain))


def test_jacfwd_of_a_recorded_batch_that_does_not_depend_on_it() -> None:
    op = define_once()

    def run(x: Tensor) -> Tensor:
        graph = record(lambda x: torch.vmap(lambda y: op(lambda y, t: y * 0 + t.sin(), y, T))(x), x)
        return graph(x)

    same(torch.func.jacfwd(run)(X), torch.zeros(2, 3, 2, 3))
