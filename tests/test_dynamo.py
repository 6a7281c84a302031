"""torch.compile: one node in Dynamo's graph per call, whatever its subgraphs are and close over."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import hopkit
from hopkit import HopkitWarning, Op, OpSpec, Subgraph
from hopkit._torch import trees
from hopkit._torch.frame import GraphBreak
from hopkit.extend.dynamo import inline
from tests.recording import Function, define_once, define_twice, nodes, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
W = torch.linspace(0.5, 1.5, 4)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def read(function: Function, *args: object, **settings: Any) -> tuple[Function, list[GraphModule]]:
    """``function`` compiled, and the graphs that Dynamo made of it for these arguments."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(function, **{"fullgraph": True, **settings}, backend=keep)
    run(*args)
    return run, graphs


class Gate(torch.nn.Module):
    """A parameter, a buffer and a module of its own."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("shift", torch.linspace(0.0, 0.2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + self.shift)

    def scaled(self, x: Tensor, by: float = 2.0) -> Tensor:
        return cast("Tensor", self(x)) * by


def _subgraphs() -> dict[str, Function]:
    torch.manual_seed(0)
    gate, weight = Gate(), W.clone().requires_grad_()
    return {
        "function": torch.sin,
        "lambda": lambda x: x * weight,
        "module": gate,
        "method": gate.scaled,
        "partial": functools.partial(gate.scaled, by=3.0),
        "graph": torch.fx.symbolic_trace(gate),
    }


@pytest.mark.parametrize("kind", _subgraphs())
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_subgraph_may_be_any_callable(kind: str, backend: str) -> None:
    twice, subgraph = define_twice(), _subgraphs()[kind]

    def run(x: Tensor) -> Tensor:
        return twice(subgraph, x, scale=2.0)

    x = X.clone().requires_grad_()
    want = run(x)
    (slope,) = torch.autograd.grad(want.sum(), x)
    _, graphs = read(run, x)
    assert [nodes(graph, twice) for graph in graphs] == [1]
    got = torch.compile(run, backend=backend, fullgraph=True)(x)
    same(got, want)
    same(torch.autograd.grad(got.sum(), x), (slope,))


def test_the_gradient_of_a_capture() -> None:
    twice, w = define_twice(), W.clone().requires_grad_()
    torch.compile(lambda x: twice(lambda y: y * w, x), backend="aot_eager", fullgraph=True)(X).sum().backward()
    got, w.grad = w.grad, None
    (X * w * w).sum().backward()
    same(got, w.grad)


def test_every_subgraph_has_its_own_captures() -> None:
    @hopkit.define("t_choose")
    def choose(left: Subgraph, *rights: Subgraph, x: Tensor) -> Tensor:
        for right in rights:
            x = left(x) + right(x)
        return x

    def run(x: Tensor, w: Tensor) -> Tensor:
        b = w + 1
        return choose(lambda y: y * w, lambda y: y - b, torch.cos, x=x)

    compiled, (graph,) = read(run, X, W)
    assert nodes(graph, choose) == 1
    same(compiled(X, W), run(X, W))


def test_a_loop_and_a_tree_are_one_node_each() -> None:
    @hopkit.define("t_loop")
    def loop(step: Subgraph, carry: Tensor, xs: Tensor) -> Tensor:
        for x in xs.unbind(0):
            carry = step(carry, x)
        return carry

    @hopkit.define("t_tree")
    def tree(combine: Subgraph, x: Tensor) -> Tensor:
        while x.shape[0] > 1:
            x = combine(x[::2], x[1::2])
        return x

    def run(x: Tensor, w: Tensor) -> Tensor:
        carry = loop(lambda carry, item: torch.tanh(carry * w + item), x[0], x)
        return tree(lambda a, b: a * w + b, x[:2]) + carry

    compiled, (graph,) = read(run, X, W)
    assert (nodes(graph, loop), nodes(graph, tree)) == (1, 1)
    same(compiled(X, W), run(X, W))


def test_operands_and_results_are_pytrees() -> None:
    @hopkit.define("t_tree_of")
    def tree_of(
        body: Subgraph[dict[str, Tensor]], x: Tensor, more: dict[str, Tensor], *, twice: bool = True
    ) -> dict[str, object]:
        first = body(x, k=more["k"])
        return {"a": first["y"], "n": 3, "t": (body(more["k"], k=x)["y"] if twice else None, x)}

    def run(x: Tensor, k: Tensor) -> dict[str, object]:
        return tree_of(lambda q, *, k: {"y": q * k, "c": q}, x, {"k": k}, twice=True)

    compiled, (graph,) = read(run, X, X + 1)
    assert nodes(graph, tree_of) == 1
    got, want = compiled(X, X + 1), run(X, X + 1)
    assert trees.flatten(got)[1] == trees.flatten(want)[1]
    same(got, want)


def test_ops_in_ops_in_cond_and_in_loops() -> None:
    twice = define_twice()

    def run(x: Tensor) -> Tensor:
        for _ in range(2):
            x = twice(lambda y: twice(lambda z: z.sin() + y.sum(), y), x)
        return cast(
            "Tensor", torch.cond(x.sum() > 0, lambda a: twice(torch.sin, a), lambda a: twice(torch.cos, a), (x,))
        )

    compiled, (graph,) = read(run, X)
    outer = [node for node in graph.graph.nodes if node.target is twice.operator]
    assert (len(outer), nodes(graph, twice)) == (2, 5)  # both have the same subgraph, which is there once
    same(compiled(X), run(X))


def test_inside_transforms_the_body_is_read() -> None:
    twice = define_twice()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        batched = torch.vmap(lambda row: twice(lambda y: y * row, row))(x)
        return batched, torch.func.grad(lambda v: twice(torch.sin, v).sum())(x)

    compiled, _ = read(run, X)
    same(compiled(X), run(X))


def test_one_graph_serves_many_sizes() -> None:
    twice = define_twice()

    def run(x: Tensor) -> Tensor:
        return twice(lambda y: y * x.shape[0] + torch.ones(y.shape[0], 1), x)

    compiled, graphs = read(run, torch.ones(3, 4), dynamic=True)
    for rows in (5, 8, 11):
        x = torch.ones(rows, 4)
        same(compiled(x), run(x))
    assert len(graphs) == 1


def test_sizes_that_nobody_knows() -> None:
    once = define_once()

    def run(x: Tensor) -> Tensor:
        return once(lambda y: y[y > 0] * 2, x)

    compiled, (graph,) = read(run, X)
    assert nodes(graph, once) == 1
    same(compiled(-X), run(-X))


def test_a_size_given_as_an_option_is_fixed() -> None:
    @hopkit.define("t_option")
    def option(body: Subgraph, x: Tensor, *, dims: tuple[int, ...] = (0,)) -> Tensor:
        return body(x) * dims[0]

    def run(x: Tensor) -> Tensor:
        return option(torch.sin, x, dims=(x.shape[0], 1))

    compiled, _ = read(run, X, dynamic=True)
    for x in (X, torch.ones(5, 4)):
        same(compiled(x), run(x))


@dataclasses.dataclass(frozen=True)
class Inner:
    """Part of a setting."""

    by: int = 2


@dataclasses.dataclass(frozen=True)
class Setting:
    """An option that is no number."""

    scale: float
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_an_option_may_be_a_frozen_dataclass() -> None:
    @hopkit.define("t_set")
    def set_(body: Subgraph, x: Tensor, *, setting: Setting) -> Tensor:
        return body(x) * setting.scale * setting.inner.by

    compiled, graphs = read(lambda x, setting: set_(torch.sin, x, setting=setting), X, Setting(2.0))
    for setting in (Setting(2.0), Setting(3.0), Setting(3.0, Inner(5))):
        same(compiled(X, setting), X.sin() * setting.scale * setting.inner.by)
    assert [nodes(graph, set_) for graph in graphs] == [1, 1, 1]


def test_a_body_that_decides_on_a_value_says_what_is_missing() -> None:
    @hopkit.define("t_branch")
    def branch(yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
        return yes(x) if x.sum() > 0 else no(x)

    with pytest.raises(GraphBreak, match=r"'t_branch'(.|\n)*inputs=(.|\n)*outputs="):
        read(lambda x: branch(torch.sin, torch.cos, x), X)
    compiled, _ = read(lambda x: branch(torch.sin, torch.cos, x), X, fullgraph=False)
    same(compiled(X + 1), (X + 1).sin())


def test_a_graph_break_in_a_subgraph_names_op_and_subgraph() -> None:
    twice = define_twice()

    @torch.compiler.disable  # type: ignore[untyped-decorator] # torch's own
    def unread(y: Tensor) -> Tensor:
        return y * 2

    def broken(y: Tensor) -> Tensor:
        return cast("Tensor", unread(y))

    with pytest.raises(GraphBreak, match=r"'body' of op 't_twice'(.|\n)*broken"):
        read(lambda x: twice(broken, x), X)
    run = torch.compile(lambda x: twice(broken, x), backend="eager")
    same(run(X), X * 4)
    compiled, _ = read(lambda x: twice(torch.sin, x), X)  # nothing is left behind
    same(compiled(X), X.sin().sin())


@pytest.mark.parametrize("how", ["writes", "appends"])
def test_a_subgraph_with_an_effect_is_read_in_place(how: str) -> None:
    twice = define_twice()

    def run(x: Tensor) -> tuple[Tensor, Tensor, int]:
        x, seen = x.clone(), []

        def body(y: Tensor) -> Tensor:
            seen.append(1)
            return y + 1

        return twice(body if how == "appends" else lambda y: y.add_(1).sin(), x), x, len(seen)

    with pytest.warns(HopkitWarning, match="'t_twice' is not kept"):
        compiled, (graph,) = read(run, X)
    assert nodes(graph, twice) == 0
    same(compiled(X), run(X))


def test_arguments_that_do_not_bind() -> None:
    twice: Op[..., Tensor] = define_twice()
    with pytest.raises(Exception, match="missing 1 required positional argument: 'x'"):
        read(lambda: twice(torch.sin))


def test_compiled_code_is_for_the_rules_that_were_there() -> None:
    once = define_once()
    run, graphs = read(lambda x: once(torch.sin, x), X)

    @once.rule("device")
    def kernel(body: Subgraph, *xs: Tensor) -> Tensor:
        return body(*xs) + 0

    same(run(X), X.sin())
    assert len(graphs) == 2


def test_a_plugin_replaces_the_reading_of_its_op() -> None:
    once, twice = define_once(), define_twice()
    asked: list[str] = []

    def rule(frame: Any, op: OpSpec) -> object:
        asked.append(op.name)
        return inline(frame, op)

    @hopkit.hookimpl(op="t_once")
    def hopkit_dynamo_rule(op: OpSpec) -> object:
        return rule

    hopkit.register(SimpleNamespace(hopkit_dynamo_rule=hopkit_dynamo_rule), name="reader")
    compiled, (graph,) = read(lambda x: once(torch.sin, twice(torch.cos, x)), X)
    assert (asked, nodes(graph, once), nodes(graph, twice)) == (["t_once"], 0, 1)
    same(compiled(X), X.cos().cos().sin())
