"""Graphs: they print, copy, pickle, run and are recorded again; sharing and naming of subgraphs."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import HopkitWarning, Op, Subgraph
from hopkit.errors import SignatureError
from hopkit.extend import Call
from hopkit.extend.proxy import Tracer, node
from tests.recording import define_once, define_twice, nodes, plainly, record, same, trained

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_is_copied_pickled_and_printed(training: bool) -> None:
    twice = define_twice()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: (y @ w).sin(), x, scale=2.0)

    x, w = X.clone().requires_grad_(training), W.clone().requires_grad_(training)
    graph = record(trained(run) if training else run, x, w)
    want = graph(x, w)
    same(copy.deepcopy(graph)(x, w), want)
    same(pickle.loads(pickle.dumps(graph))(x, w), want)
    same(torch.fx.Interpreter(graph).run(x, w), want)
    assert "torch.ops.higher_order.t_twice(" in graph.print_readable(print_output=False)


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_that_is_recorded_again_keeps_its_nodes(training: bool) -> None:
    twice = define_twice()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: (y @ w).sin(), x, scale=2.0)

    x, w = X.clone().requires_grad_(training), W.clone().requires_grad_(training)
    graph = record(trained(run) if training else run, x, w)
    for again in (record(graph, x, w), make_fx(functionalize(graph))(x.detach(), w.detach())):
        assert nodes(again, twice) == nodes(graph, twice)
        same(again(x, w), graph(x, w))


def test_symbolic_sizes_when_recorded_again() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(lambda y: y * y.shape[0], x), torch.ones(5, 2), mode="symbolic")
    again = record(graph, torch.ones(4, 3), mode="symbolic")
    assert nodes(again, twice) == 1
    same(again(torch.ones(5, 6)), torch.full((5, 6), 25.0))


def test_fx_traces_symbolically_through_the_body() -> None:
    twice = define_twice()
    graph = torch.fx.symbolic_trace(lambda x: twice(torch.sin, x))
    same(graph(X), X.sin().sin())


def test_fx_traces_symbolically_over_a_node() -> None:
    twice = define_twice()
    graph = torch.fx.symbolic_trace(record(lambda x: twice(torch.sin, x), X))
    assert nodes(graph, twice) == 1
    same(graph(W), W.sin().sin())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_jit_traces_the_body() -> None:
    twice = define_twice()
    same(torch.jit.trace(lambda x: twice(torch.sin, x), X)(W), W.sin().sin())


def test_two_graphs_have_two_names() -> None:
    once = define_once()
    graph = record(lambda x: once(torch.sin, x) + once(torch.cos, x), X)
    assert [name for name, _ in graph.named_children()] == ["t_once_body", "t_once_body_1"]
    same(graph(W), W.sin() + W.cos())


def test_one_subgraph_on_two_shapes_is_two_graphs_of_one_node() -> None:
    @hopkit.define("t_shapes")
    def shapes(body: Subgraph, x: Tensor) -> Tensor:
        return body(x).sum() + body(x[0]).sum()

    graph = record(lambda x: shapes(torch.sin, x), X)
    assert nodes(graph, shapes) == 1
    assert len(list(graph.named_children())) == 2
    same(graph(W), W.sin().sum() + W[0].sin().sum())


def test_options_stay_readable_in_the_node() -> None:
    @hopkit.define("t_options")
    def options(body: Subgraph, x: Tensor, *, scale: float, dtype: torch.dtype, axes: tuple[int, ...]) -> Tensor:
        return (scale * body(x)).to(dtype).permute(axes).clone()

    graph = record(lambda x: options(torch.sin, x, scale=2.0, dtype=torch.float64, axes=(1, 0)), X)
    (node,) = (node for node in graph.graph.nodes if node.target is options.operator)
    assert (node.kwargs["scale"], node.kwargs["dtype"]) == (2.0, torch.float64)
    same(graph(W), options.spec.body(torch.sin, W, scale=2.0, dtype=torch.float64, axes=(1, 0)))


def test_autocast_in_a_subgraph_is_recorded() -> None:
    twice = define_twice()
    with torch.autocast("cpu", torch.bfloat16):
        graph = record(lambda x: twice(lambda y: y @ W, x), X)
        want = plainly(lambda: twice(lambda y: y @ W, X))
    assert nodes(graph, twice) == 1
    same(graph(X), want)


def test_autocast_in_the_body_decomposes() -> None:
    @hopkit.define("t_matmul")
    def matmul(body: Subgraph, x: Tensor, y: Tensor) -> Tensor:
        return body(x) @ y

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(HopkitWarning, match="autocast changes what the body itself computes"):
            graph = record(lambda x: matmul(torch.sin, x, W), X)
        want = plainly(lambda: matmul(torch.sin, X, W))
    same(graph(X), want)


def test_a_node_under_autocast_says_what_does_not_fit() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(lambda y: y @ W, x), X)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(SignatureError, match="bfloat16"):
        graph(X)


def test_transforms_inside_the_recorder_see_the_body() -> None:
    twice = define_twice()

    def slope(x: Tensor) -> Tensor:
        slope: Tensor = torch.func.grad(lambda a: twice(lambda y: (y * W).sin(), a).sum())(x)
        return slope

    graph = record(torch.vmap(slope), torch.stack([X, W]))
    same(graph(torch.stack([W, X])), plainly(torch.vmap(slope), torch.stack([W, X])))


def test_a_capture_that_is_batched() -> None:
    twice = define_twice()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: y * w, x)

    batched = torch.vmap(run, in_dims=(None, 0))
    want = torch.stack([X * W * W, X * X * X])
    same(batched(X, torch.stack([W, X])), want)
    same(record(batched, W, torch.stack([W, W]))(X, torch.stack([W, X])), want)


def test_a_vanished_op_leaves_no_node() -> None:
    twice = define_twice()
    with hopkit.decompose(twice):
        graph = record(lambda x: twice(torch.sin, x), X)
    assert nodes(graph, twice) == 0
    same(graph(W), W.sin().sin())


@pytest.mark.parametrize(
    "name", ["mode", "op", "rules", "layer", "args", "self", "dispatch_key", "hopkit", "public_api"]
)
def test_an_option_may_have_any_name(name: str) -> None:
    scope: dict[str, object] = {"Subgraph": Subgraph, "Tensor": Tensor}
    exec(f"def body(f: Subgraph, x: Tensor, /, *, {name}: float = 1.0) -> Tensor: return f(x) * {name}", scope)
    op: Any = hopkit.define("t_named")(scope["body"])  # type: ignore[arg-type] # a body made of text
    x = torch.tensor([1.0, 2.0], requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return torch.autograd.grad(op(torch.sin, x, **{name: 3.0}).sum(), x)[0]

    same(op(torch.sin, x, **{name: 3.0}), 3 * x.sin())
    same(make_fx(step)(x)(x), 3 * x.cos())
    same(make_fx(step, tracing_mode="symbolic")(x)(x), 3 * x.cos())
    same(make_fx(torch.func.functionalize(lambda x: op(torch.sin, x, **{name: 3.0})))(X)(X), 3 * X.sin())


def define_apply() -> Op[..., Tensor]:
    @hopkit.define("t_apply", autograd="deferred_error")
    def apply(graph: torch.fx.GraphModule, args: tuple[object, ...], *, times: int = 1) -> Tensor:
        return cast("Tensor", graph(*args)) * times

    return apply


def test_a_node_without_a_layout_has_the_numbers_that_were_passed() -> None:
    apply, graph = define_apply(), torch.fx.symbolic_trace(lambda x, scale, nothing: x * scale)

    def run(x: Tensor) -> list[Tensor]:
        return [apply(graph, args, times=2) for args in ((x, 0.5, None), (x, 0.75, None), (x, 0.5, None))]

    for recorded in (record(run, X), make_fx(functionalize(run))(X)):
        (x,) = recorded.graph.find_nodes(op="placeholder")
        found = recorded.graph.find_nodes(op="call_function", target=apply.operator)
        assert [node.args[1] for node in found] == [(x, 0.5, None), (x, 0.75, None), (x, 0.5, None)]
        assert [node.kwargs for node in found] == [{"times": 2}] * 3
        assert len({id(getattr(recorded, node.args[0].target)) for node in found}) == 2
        same(recorded(W), run(W))


def test_only_a_proxy_rule_of_its_own_leaves_arguments_nested() -> None:
    apply, graph = define_apply(), torch.fx.symbolic_trace(lambda both, named: both[0] * both[1] + named["w"])

    def run(x: Tensor, w: Tensor) -> Tensor:
        return apply(graph, ((x, 0.5), {"w": w}))

    def inputs(recorded: torch.fx.GraphModule) -> object:
        (node,) = recorded.graph.find_nodes(op="call_function", target=apply.operator)
        return node.args[1]

    recorded = record(run, X, W)
    assert inputs(recorded) == tuple(recorded.graph.find_nodes(op="placeholder"))
    same(recorded(W, X), run(W, X))

    @apply.rule("proxy")
    def as_given(tracer: Tracer, call: Call) -> object:
        tracer.register("given", cast("torch.fx.GraphModule", call.graphs[0]))
        return node(tracer, call)

    recorded = record(run, X, W)
    x, w = recorded.graph.find_nodes(op="placeholder")
    assert inputs(recorded) == ((x, 0.5), {"w": w})
    assert recorded.given is graph
    same(recorded(W, X), run(W, X))
