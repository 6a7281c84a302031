"""functionalize: nodes without mutation, whatever their subgraphs did inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import Subgraph
from tests.recording import define_once, define_twice, nodes, plainly, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)


def mutations(graph: torch.fx.GraphModule) -> list[str]:
    """The operators of a graph and its subgraphs that write to their inputs."""
    modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = [str(node.target) for module in modules for node in module.graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("aten.") and target.split(".")[1].endswith("_")]


def aot_graph(function: Any, *args: Tensor) -> tuple[Any, torch.fx.GraphModule]:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = aot_function(function, keep)
    compiled(*args)
    return compiled, graphs[0]


def accumulate(y: Tensor) -> Tensor:
    total = torch.zeros_like(y)
    total.add_(y)
    total[0].mul_(3)
    return total.t().sub_(1)


def test_subgraphs_are_made_pure() -> None:
    twice = define_twice()
    graph = make_fx(functionalize(lambda x: twice(accumulate, x)))(X)
    assert nodes(graph, twice) == 1
    assert not mutations(graph)
    same(graph(W), accumulate(accumulate(W)))


def test_subgraphs_are_made_pure_under_aot_autograd() -> None:
    twice = define_twice()
    compiled, graph = aot_graph(lambda x: twice(accumulate, x), X)
    assert nodes(graph, twice) == 1
    assert not mutations(graph)
    same(compiled(W), accumulate(accumulate(W)))


def test_writing_around_a_node() -> None:
    twice = define_twice()

    def run(x: Tensor) -> Tensor:
        x = x.clone()
        y = twice(torch.sin, x)
        x.add_(1)
        y.mul_(2)
        return x + y + twice(torch.sin, x)

    graph = make_fx(functionalize(run))(X)
    assert nodes(graph, twice) == 2
    assert not mutations(graph)
    same(graph(W), plainly(run, W))


def test_a_graph_that_was_recorded_before_is_functionalized() -> None:
    twice = define_twice()
    graph = make_fx(lambda x: twice(accumulate, x))(X)
    assert mutations(graph)
    again = make_fx(functionalize(graph))(X)
    assert nodes(again, twice) == 1
    assert not mutations(again)
    same(again(W), accumulate(accumulate(W)))


def test_a_nested_op_stays_nested() -> None:
    twice = define_twice()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: twice(lambda z: accumulate(z * w), y) + w, x)

    compiled, graph = aot_graph(run, X, W)
    assert nodes(graph, twice) == 2
    assert not mutations(graph)
    same(compiled(W, X), plainly(run, W, X))


def test_an_output_that_is_an_operand_is_that_operand() -> None:
    @hopkit.define("t_pair")
    def pair(body: Subgraph, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, body(x)

    def run(x: Tensor) -> Tensor:
        kept, result = pair(torch.sin, x)
        kept.add_(1)
        return x + result

    graph = make_fx(functionalize(run))(X.clone())
    mine, plain = W.clone(), W.clone()
    same((graph(mine), mine), (plainly(run, plain), plain))


def test_a_subgraph_shared_by_two_nodes() -> None:
    once = define_once()
    graph = make_fx(functionalize(lambda x: once(accumulate, once(accumulate, x))))(X)
    assert nodes(graph, once) == 2
    same(graph(W), accumulate(accumulate(W)))


def test_dynamic_sizes_under_aot_autograd() -> None:
    twice = define_twice()
    compiled = aot_function(
        lambda x: twice(lambda y: y * y.shape[0], x), lambda graph, _: make_boxed_func(graph.forward), dynamic=True
    )
    for size in (4, 5, 6):
        same(compiled(torch.ones(size, 3)), torch.full((size, 3), float(size**2)))


@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_views_in_subgraphs_go_where_they_go_outside(remove: Any) -> None:
    once = define_once()
    body, op = (make_fx(functionalize(run, remove=remove))(X) for run in (turned, lambda x: once(turned, x)))
    assert nodes(op, once) == 1
    same(op(W), body(W))
    assert op(W).stride() == body(W).stride()


def turned(y: Tensor) -> Tensor:
    return y.t().sin()


@pytest.mark.parametrize("inner", ["mutations", "mutations_and_views"])
@pytest.mark.parametrize("outer", ["mutations", "mutations_and_views"])
def test_functionalized_outside_and_inside_a_derivative(outer: Any, inner: Any) -> None:
    once = define_once()

    def slope(body: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def inside(x: Tensor) -> Tensor:
            return functionalize(body, remove=inner)(x).sum()  # type: ignore[no-any-return] # torch's

        return functionalize(torch.func.grad(inside), remove=outer)

    def body(y: Tensor) -> Tensor:
        return y.clone().t().mul_(y.t()).sin()

    graph = make_fx(slope(lambda x: once(body, x)))(X)
    assert nodes(graph, once)
    same(graph(W), slope(body)(W))
