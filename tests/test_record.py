"""Recording: what a subgraph closes over becomes an input, and a graph is shared only where it is the same."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import HopkitWarning, Subgraph, SubgraphError
from hopkit.errors import DataDependentError, SignatureError
from tests.recording import Function, define_once, define_twice, nodes, plainly, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)
LINEAR = torch.nn.Linear(3, 3)
NORM = torch.nn.BatchNorm1d(3).eval()
HOLDER = SimpleNamespace(weight=W, many=[W * 2, W + 1])


def outer(x: Tensor) -> Tensor:
    return x * W


def outer_sum(x: Tensor) -> Tensor:
    return (x * W).sin().sum()


def with_default(x: Tensor, weight: Tensor = W) -> Tensor:
    return x @ weight


CLOSURES: dict[str, Function] = {
    "global": outer,
    "default argument": with_default,
    "module": LINEAR,
    "buffers": NORM,
    "bound method": LINEAR.forward,
    "partial": functools.partial(torch.mul, W),
    "attribute": lambda x: x * HOLDER.weight,
    "list": lambda x: x * HOLDER.many[0] + HOLDER.many[1],
    "inside a list": lambda x: torch.stack([x, W]).sum(0),
    "graph module": torch.fx.symbolic_trace(torch.nn.Sequential(LINEAR, torch.nn.Tanh())),
    "under vmap": lambda x: torch.vmap(lambda row: row * W[0])(x),
    "under func.grad": torch.func.grad(outer_sum),
    "under no_grad": torch.no_grad()(outer),
}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CLOSURES)
def test_a_capture_becomes_an_input(name: str, mode: str) -> None:
    twice = define_twice()
    graph = record(lambda x: twice(CLOSURES[name], x), X, mode=mode)  # type: ignore[arg-type] # one of the three
    assert nodes(graph, twice) == 1
    same(graph(X + 1), twice.spec.body(CLOSURES[name], X + 1))


def test_a_capture_that_is_only_returned() -> None:
    @hopkit.define("t_pair")
    def pair(body: Subgraph[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        return body(x)

    graph = record(lambda x: pair(lambda y: (W, y * 2), x), X)
    assert nodes(graph, pair) == 1
    same(graph(X), (W, X * 2))


def test_a_captured_size_in_a_slice() -> None:
    once = define_once()

    def run(x: Tensor) -> Tensor:
        size = x.shape[0]
        return once(lambda y: y[:size] * 2, torch.arange(100.0))

    graph = record(run, torch.ones(3), mode="symbolic")
    assert nodes(graph, once) == 1
    same(graph(torch.ones(5)), torch.arange(5.0) * 2)


def test_an_operand_that_is_captured_too() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(lambda y: y * x, x), X)
    assert nodes(graph, twice) == 1
    same(graph(W), W**3)


def test_a_nested_op_captures_what_the_outer_subgraph_captures() -> None:
    twice = define_twice()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: twice(lambda z: z * w, y) + w, x)

    graph = record(run, X, W)
    assert nodes(graph, twice) == 2
    same(graph(W, X), plainly(run, W, X))


def test_a_subgraph_may_differentiate_something_itself() -> None:
    once = define_once()

    def slope(y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        return torch.autograd.grad((y * W).sin().sum(), y)[0]

    graph = record(lambda x: once(slope, x), X)
    assert nodes(graph, once) == 1
    same(graph(W), slope(W))


def test_one_subgraph_is_traced_once() -> None:
    once = define_once()
    graph = record(lambda x: once(outer, once(outer, x)), X)
    assert nodes(graph, once) == 2
    assert [name for name, _ in graph.named_children()] == ["t_once_body"]
    same(graph(X), outer(outer(X)))


@pytest.mark.parametrize(
    "function",
    [
        lambda state, a, b: a * state,
        lambda state, a, b: a - b if state else b - a,
        lambda state, a, b: (a * b) + (a if state else b),
        lambda state, a, b: (a.to(torch.float16 if state else torch.float64) / 3).float(),
        lambda state, a, b: a[:, state : state + 2] * 2,
        lambda state, a, b: a * HOLDER.many[state],
        lambda state, a, b: a * torch.tensor(float(state)),
        lambda state, a, b: [a.sin(), a.cos()][state],
    ],
    ids=["number", "order", "wiring", "dtype", "slice", "list", "constant", "choice"],
)
def test_a_subgraph_that_changes_between_two_calls_is_not_shared(function: Function) -> None:
    once = define_once()

    def run(a: Tensor, b: Tensor) -> list[Tensor]:
        state = [0]

        def body(a: Tensor, b: Tensor) -> object:
            return function(state[0], a, b)

        first = once(body, a, b)
        state[0] = 1
        return [first, once(body, a, b)]

    graph = record(run, X, W)
    assert nodes(graph, once) == 2
    same(graph(W, X), plainly(run, W, X))


def test_a_captured_size_that_changes_between_two_calls() -> None:
    once = define_once()

    def run(x: Tensor, z: Tensor) -> list[Tensor]:
        size = [x.shape[0]]

        def body(y: Tensor) -> Tensor:
            return y * size[0]

        first = once(body, x.sum())
        size[0] = z.shape[0]
        return [first, once(body, x.sum())]

    graph = record(run, torch.ones(3), torch.ones(7), mode="symbolic")
    assert nodes(graph, once) == 2
    same(graph(torch.ones(5), torch.ones(9)), [torch.tensor(25.0), torch.tensor(45.0)])


def test_a_subgraph_that_changes_within_one_call_decomposes() -> None:
    twice = define_twice()
    calls: list[int] = []

    def body(y: Tensor) -> Tensor:
        calls.append(1)
        return y * 2 if len(calls) % 2 else y * 3

    with pytest.warns(HopkitWarning, match="subgraph 'body' does something else when it is called again"):
        graph = record(lambda x: twice(body, x), X)
    assert nodes(graph, twice) == 0
    same(graph(X), X * 6)


@pytest.mark.parametrize("value", ["text", object(), {1}])
def test_a_result_that_no_graph_can_give_is_an_error(value: object) -> None:
    once = define_once()
    with pytest.raises(SubgraphError, match=f"subgraph 'body' of op 't_once' returned a {type(value).__name__}"):
        record(lambda x: once(lambda y: (y, value), x), X)


def test_numbers_and_none_in_a_result() -> None:
    @hopkit.define("t_any")
    def keep(body: Subgraph[object], x: Tensor) -> object:
        return body(x)

    graph = record(lambda x: keep(lambda y: {"a": y * 2, "b": (3, None, 1.5)}, x), X)
    same(graph(X), {"a": X * 2, "b": (3, None, 1.5)})


def test_subgraph_arguments_by_keyword() -> None:
    @hopkit.define("t_keywords")
    def keywords(body: Subgraph, x: Tensor) -> Tensor:
        return body(x, other=x + 1, power=3)

    graph = record(lambda x: keywords(lambda y, *, power, other: y * other**power, x), X)
    assert nodes(graph, keywords) == 1
    same(graph(W), W * (W + 1) ** 3)


def test_a_loop_passes_python_numbers() -> None:
    @hopkit.define("t_counted")
    def counted(body: Subgraph, x: Tensor, *, trips: int) -> Tensor:
        for i in range(trips):
            x = body(i, x)
        return x + 0

    graph = record(lambda x: counted(lambda i, y: y * i + 1, x, trips=4), X)
    assert nodes(graph, counted) == 1
    same(graph(W), counted.spec.body(lambda i, y: y * i + 1, W, trips=4))


def test_more_than_64_signatures_decompose() -> None:
    @hopkit.define("t_counted")
    def counted(body: Subgraph, x: Tensor, *, trips: int) -> Tensor:
        for i in range(trips):
            x = body(i, x)
        return x

    with pytest.warns(HopkitWarning, match="more than 64 different signatures"):
        graph = record(lambda x: counted(lambda i, y: y + i, x, trips=65), X)
    same(graph(X), X + sum(range(65)))


def test_a_subgraph_that_is_never_called() -> None:
    @hopkit.define("t_counted")
    def counted(body: Subgraph, x: Tensor, *, trips: int) -> Tensor:
        for _ in range(trips):
            x = body(x)
        return x * 2

    graph = record(lambda x: counted(torch.sin, x, trips=0), X)
    assert nodes(graph, counted) == 1
    same(graph(X), X * 2)


def test_another_size_than_recorded_is_an_error() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x), X)
    with pytest.raises(SignatureError, match=r"recorded for \(float32\[3, 3\]@cpu\).*with \(float32\[4, 3\]@cpu\)"):
        graph(torch.ones(4, 3))


def test_symbolic_sizes_through_a_tree() -> None:
    @hopkit.define("t_halving")
    def halving(combine: Subgraph, xs: Tensor) -> Tensor:
        while xs.shape[0] > 1:
            xs = combine(xs[::2], xs[1::2])
        return xs * 1

    graph = record(lambda x: halving(torch.add, x), torch.ones(8, 2), mode="symbolic")
    assert nodes(graph, halving) == 1
    same(graph(torch.ones(8, 5)), torch.full((1, 5), 8.0))


@pytest.mark.parametrize(
    "body",
    [
        lambda y: y.nonzero().float() * 2,
        lambda y: y.nonzero().float().sum() * y,
        lambda y: y * y.sum().item(),
    ],
    ids=["size out", "size inside", "number inside"],
)
def test_sizes_and_numbers_that_nobody_knows_before(body: Function) -> None:
    once = define_once()
    graph = record(lambda x: once(body, x), X, mode="symbolic")
    assert nodes(graph, once) == 1
    for x in (X, torch.eye(3), X.relu()):
        same(graph(x), body(x))


def test_a_captured_size_that_nobody_knows_before() -> None:
    once = define_once()

    def run(x: Tensor) -> Tensor:
        count = x.nonzero().shape[0]
        return once(lambda y: y * count, x)

    graph = record(run, X, mode="symbolic")
    assert nodes(graph, once) == 1
    same(graph(torch.eye(3)), torch.eye(3) * 3)


def test_a_body_that_decides_on_a_value_says_what_to_declare() -> None:
    @hopkit.define("t_choose")
    def choose(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) if bool(x.sum() > 0) else x * 2

    with pytest.raises(DataDependentError, match=r"op 't_choose'.*`inputs=lambda"):
        record(lambda x: choose(torch.sin, x), X, mode="fake")


def test_a_body_with_a_weight_of_its_own_decomposes() -> None:
    weight = W.clone().requires_grad_()

    @hopkit.define("t_weighted")
    def weighted(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) * weight

    with pytest.warns(HopkitWarning, match="neither an operand nor a capture"):
        graph = record(lambda x: torch.autograd.grad(weighted(torch.sin, x).sum(), weight), X)
    same(graph(X), (X.sin(),))


@pytest.mark.parametrize("how", [record, lambda run, x: torch.compile(run, backend="eager", fullgraph=True)])
def test_a_subgraph_asks_whether_it_is_given_a_parameter(how: Any) -> None:
    op, weight = define_once(), torch.nn.Parameter(torch.ones(2))

    def run(x: Tensor) -> Tensor:
        return op(lambda y: y * 3 if isinstance(y, torch.nn.Parameter) else y * 2, x)

    same(how(run, weight)(weight), weight * 3)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_what_an_op_inside_decides_on_is_captured(mode: Any) -> None:
    @hopkit.define("t_branch", inputs=lambda yes, no, use, x: ((x,), (x,)), outputs=lambda yes, no, use, x: x + 0)
    def branch(yes: Subgraph, no: Subgraph, use: Tensor, x: Tensor) -> Tensor:
        return yes(x) if use > 0 else no(x)

    op, yes, x = define_once(), torch.tensor(1.0), torch.tensor([1.0, 2.0])

    def run(use: Tensor, x: Tensor) -> Tensor:
        return op(lambda y: branch(torch.sin, torch.cos, use, y), x)

    for recorded in (make_fx(run, tracing_mode=mode)(yes, x), torch.compile(run, backend="aot_eager", fullgraph=True)):
        for use in (yes.clone(), -yes):
            same(recorded(use, x * 2), plainly(run, use, x * 2))
