"""What a call gets that is not as its op's parameters say: the same in plain eager and in a recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import CallError, LayoutError, Subgraph, SubgraphError
from hopkit.op import AnyOp
from tests.recording import define_once, define_twice, nodes, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)

Caller = Callable[..., object]

CALLERS: dict[str, Caller] = {
    "eager": lambda op, *args, **kwargs: op(*args, **kwargs),
    "recorded": lambda op, f, x, *rest, **kwargs: record(lambda x: op(f, x, *rest, **kwargs), x),
}
callers = pytest.mark.parametrize("call", CALLERS.values(), ids=CALLERS)


class Box:
    """No pytree."""

    def __init__(self, content: object) -> None:
        self.content = content

    def __repr__(self) -> str:
        return "Box()"


def define_sum() -> AnyOp:
    """The sum of what some of the subgraphs give: ``few`` of them."""

    @hopkit.define("t_sum")
    def total(fs: tuple[Subgraph, ...], x: Tensor, *, dims: tuple[int, ...] = (0,), few: int = 1) -> Tensor:
        return torch.stack([f(x) for f in fs[:few]]).sum(0).sum(dims)

    return total


# Options


@callers
@pytest.mark.parametrize("scale", ["ab", None, (1.0,), torch.sin, [1.0], X])
def test_an_option_of_another_kind(call: Caller, scale: Any) -> None:
    with pytest.raises(CallError, match=r"^t_twice\(\) argument 'scale' expected .*float.*, got ") as caught:
        call(define_twice(), torch.sin, X, scale=scale)
    assert isinstance(caught.value, TypeError)


@callers
def test_an_option_of_another_kind_in_a_tuple(call: Caller) -> None:
    with pytest.raises(CallError, match=r"argument 'dims' expected tuple\[int, ...\], got \(int, str\)"):
        call(define_sum(), (torch.sin,), X, dims=(0, "a"))


@pytest.mark.parametrize("scale", [2, True, numpy.float64(2), numpy.float32(2), numpy.int64(2)], ids=repr)
def test_a_number_of_another_kind_is_recorded_as_what_it_stands_for(scale: Any) -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x, scale=scale), X)
    (node,) = graph.graph.find_nodes(op="call_function", target=twice.operator)
    assert type(node.kwargs["scale"]) in (int, float, bool)
    same(graph(X), twice(torch.sin, X, scale=scale))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_a_shape_is_recorded_as_a_tuple(mode: Any) -> None:
    @hopkit.define("t_filled")
    def filled(f: Subgraph, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return f(x.sum().expand(shape))

    graph = record(lambda x: filled(torch.sin, x, x.shape), X, mode=mode)
    assert nodes(graph, filled) == 1
    same(graph(X), X.sum().sin().expand(2, 3))


def test_the_body_sees_in_plain_eager_what_is_recorded() -> None:
    seen: list[object] = []

    @hopkit.define("t_seen")
    def watched(f: Subgraph, x: Tensor, n: int, shape: tuple[int, ...]) -> Tensor:
        seen.extend((n, shape))
        return f(x)

    watched(torch.sin, X, numpy.int64(2), X.shape)  # type: ignore[arg-type] # an int, but for its type
    assert list(map(type, seen)) == [int, tuple]


@pytest.mark.parametrize("scale", [lambda x: x.shape[0], lambda x: x.shape[0] * 0.5], ids=["SymInt", "SymFloat"])
def test_a_symbolic_number_is_recorded_as_the_number_it_is(scale: Callable[[Tensor], Any]) -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x, scale=scale(x)), X, mode="symbolic")
    assert nodes(graph, twice) == 1
    same(graph(X), twice(torch.sin, X, scale=scale(X)))


def test_a_number_that_only_the_graph_tells_is_no_option() -> None:
    total = define_sum()
    with pytest.raises(
        CallError, match=r"t_sum\(\) argument 'few' .* only running the graph.*`few: int \| torch.SymInt`"
    ):
        record(lambda x: total((torch.sin,), x, few=x.sum().int().item()), X, mode="symbolic")


# Subgraphs


@callers
def test_what_cannot_be_called_among_subgraphs_that_are_not(call: Caller) -> None:
    with pytest.raises(CallError, match=r"^t_sum\(\) argument 'fs' expected a callable, got int"):
        call(define_sum(), (torch.sin, 3), X)


@callers
def test_what_cannot_be_called_where_the_body_does_not_call_it(call: Caller) -> None:
    @hopkit.define("t_first")
    def first(f: Subgraph, x: Tensor, g: Subgraph) -> Tensor:
        return f(x)

    with pytest.raises(CallError, match=r"^t_first\(\) argument 'g' expected a callable, got str"):
        call(first, torch.sin, X, "cos")


# What no pytree of tensors and numbers can hold


@pytest.mark.parametrize("wrap", [Box, lambda y: {y}, lambda y: (y, Box(y))], ids=["object", "set", "inside"])
def test_a_subgraph_that_gives_something_else(wrap: Callable[[Tensor], object]) -> None:
    once = define_once()
    with pytest.raises(SubgraphError, match=r"^subgraph 'body' of op 't_once' returned a (Box|set)"):
        record(lambda x: once(lambda y: wrap(y.sin()), x), X)


@pytest.mark.parametrize("wrap", [Box, lambda y: {y}, lambda y: (y, Box(y))], ids=["object", "set", "inside"])
def test_a_body_that_gives_something_else(wrap: Callable[[Tensor], object]) -> None:
    @hopkit.define("t_wrapped")
    def wrapped(f: Subgraph, x: Tensor) -> object:
        return wrap(f(x))

    with pytest.raises(SubgraphError, match=r"^the body of op 't_wrapped' returned a (Box|set).*Return a pytree"):
        record(lambda x: wrapped(torch.sin, x), X)
    assert type(wrapped(torch.sin, X)) is type(wrap(X))


def test_constants_beside_the_tensors_are_kept() -> None:
    @hopkit.define("t_told")
    def told(f: Subgraph, x: Tensor) -> tuple[object, ...]:
        return f(x), "sin", x.dtype, x.shape, None

    def run(x: Tensor) -> object:
        result, *others = told(torch.sin, x)
        assert others == ["sin", torch.float32, (2, 3), None]
        return result

    same(record(run, X)(X), X.sin())


def test_an_operand_that_cannot_be_written_down() -> None:
    @hopkit.define("t_tagged")
    def tagged(f: Subgraph, x: Tensor, tags: tuple[object, ...]) -> Tensor:
        return f(x)

    with pytest.raises(LayoutError, match=r"^t_tagged\(\) argument 'tags' holds a Box, which cannot be written"):
        record(lambda x: tagged(torch.sin, x, (1, Box(2))), X)
    same(tagged(torch.sin, X, (1, Box(2))), X.sin())


def test_a_subgraph_that_is_given_what_cannot_be_written_down() -> None:
    @hopkit.define("t_boxed")
    def boxed(f: Subgraph, x: Tensor) -> Tensor:
        return f(x, Box(x))

    with pytest.raises(SubgraphError, match=r"^subgraph 'f' of op 't_boxed' was given a Box, which cannot be written"):
        record(lambda x: boxed(lambda y, box: y.sin(), x), X)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_a_subgraph_may_be_given_a_shape(mode: Any) -> None:
    @hopkit.define("t_shaped")
    def shaped(f: Subgraph, x: Tensor) -> Tensor:
        return f(x, x.shape)

    graph = record(lambda x: shaped(lambda y, shape: y.sin().reshape(shape[::-1]), x), X, mode=mode)
    assert nodes(graph, shaped) == 1
    same(graph(X), X.sin().reshape(3, 2))


# Schemas


def test_a_schema_is_given_for_the_author_s_arguments_as_for_a_node_s() -> None:
    total = define_sum()
    graph = record(lambda x: total((torch.sin, torch.cos), x, few=2), X)
    (node,) = graph.graph.find_nodes(op="call_function", target=total.operator)
    subgraphs = [getattr(graph, name.target) for name in node.args[:2]]
    of_node = total.operator.gen_schema(*subgraphs, (X,), **node.kwargs)
    of_call = total.operator.gen_schema((torch.sin, torch.cos), X, few=2)
    assert str(of_call) == str(of_node)
    assert "t_sum(Any graph0, Any graph1, Tensor input0, int few, " in str(of_call)


def test_a_schema_of_a_call_that_does_not_bind() -> None:
    with pytest.raises(CallError, match=r"t_twice\(\) missing 1 required positional argument: 'x'"):
        define_twice().operator.gen_schema(torch.sin)


def test_a_schema_of_a_call_that_is_no_node() -> None:
    with pytest.raises(
        CallError, match=r"gen_schema\(\) got a call that is no node of a graph: it writes to operand 'x'"
    ):
        define_twice().operator.gen_schema(lambda y: y.add_(1), X)
