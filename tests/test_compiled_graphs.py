"""torch.compile of a graph that holds nodes, recorded or loaded: each node is read, and is one node again."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import HopkitWarning, Op, Subgraph
from tests.recording import Function, define_once, define_twice, nodes, record, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),  # torch's own decompositions
]

X = torch.linspace(-1.0, 1.0, 16).reshape(4, 4)
W = torch.linspace(0.5, 1.5, 4)


def compile(function: Any, *args: object, **settings: Any) -> tuple[Function, list[GraphModule]]:
    """``function`` compiled, and the graphs that Dynamo made of it for these arguments."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> Function:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    run: Function = torch.compile(function, **{"fullgraph": True, **settings}, backend=keep)
    run(*args)
    return run, graphs


def define_tree() -> Op[..., Tensor]:
    @hopkit.define("t_tree")
    def tree(combine: Subgraph, x: Tensor) -> Tensor:
        while x.shape[0] > 1:
            x = combine(x[::2], x[1::2])
        return x

    return tree


def define_branch() -> Op[..., Tensor]:
    @hopkit.define("t_branch", inputs=lambda yes, no, x: ((x,), (x,)), outputs=lambda yes, no, x: yes(x))
    def branch(yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
        return yes(x) if x.sum() > 0 else no(x)

    return branch


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("shape", ["twice", "tree", "branch", "literal", "nested"])
def test_a_recorded_graph(shape: str, mode: Any) -> None:
    twice, tree, branch = define_twice(), define_tree(), define_branch()
    functions: dict[str, tuple[Op[..., Tensor], Function]] = {
        "twice": (twice, lambda x, w: twice(lambda y: y * w, x, scale=2.0)),
        "tree": (tree, lambda x, w: tree(lambda a, b: a * w + b, x)),
        "branch": (branch, lambda x, w: branch(lambda y: y * w, lambda y: y - w, x)),
        "literal": (twice, lambda x, w: twice(lambda y: y * w + torch.tensor([1.0, 2.0, 3.0, 4.0]), x)),
        "nested": (twice, lambda x, w: twice(lambda y: twice(lambda z: z * w + y.shape[0], y), x)),
    }
    op, function = functions[shape]
    graph = record(function, X, W, mode=mode)
    run, (compiled,) = compile(graph, X, W)
    assert nodes(compiled, op) == nodes(graph, op)
    for x in (X, -X):
        same(run(x, W), function(x, W))


def test_the_graph_of_a_derivative() -> None:
    twice = define_twice()

    def slope(x: Tensor, w: Tensor) -> Tensor:
        return torch.autograd.grad(twice(lambda y: y.sin() * w, x).sum(), x)[0]

    x = X.clone().requires_grad_()
    run, (compiled,) = compile(make_fx(slope)(x, W), x, W)
    assert nodes(compiled, twice) == 2
    same(run(x, W), slope(x, W))


class Gate(torch.nn.Module):
    """An op whose subgraph closes over a module."""

    def __init__(self, twice: Op[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice = twice
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(lambda y: torch.tanh(self.linear(y)), x)


@pytest.mark.parametrize("strict", [False, True])
def test_a_loaded_program_trains(strict: bool) -> None:
    twice = define_twice()
    model, file = Gate(twice), io.BytesIO()
    torch.export.save(torch.export.export(model, (X,), strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    run, (compiled,) = compile(loaded, X)
    assert nodes(compiled, twice) == 1
    ahead = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    for trial in (run, ahead):
        loaded.zero_grad()
        model.zero_grad()
        same(trained(trial)(X.clone().requires_grad_()), trained(model)(X.clone().requires_grad_()))
        cast("Tensor", trial(X)).sum().backward()
        model(X).sum().backward()
        same([p.grad for p in loaded.parameters()], [p.grad for p in model.parameters()])


def test_under_a_transform() -> None:
    twice = define_twice()
    run, (compiled,) = compile(torch.vmap(record(lambda x: twice(torch.sin, x), X[0])), X)
    assert nodes(compiled, twice) == 1
    same(run(X), X.sin().sin())


def literal(y: Tensor) -> Tensor:
    return y.sin() * torch.tensor([1.0, 2.0, 3.0, 4.0])


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": trained,
    "second grad": lambda f: trained(f, second=True),
    "vmap": lambda f: torch.vmap(f, in_dims=1),
    "vmap of jvp": lambda f: torch.vmap(lambda x: torch.func.jvp(f, (x,), (x.cos(),))),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: cast("Tensor", f(x)).sum()), in_dims=1),
}


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_whose_graph_holds_a_tensor(name: str, mode: Any) -> None:
    twice = define_twice()
    step = TRANSFORMS[name](lambda x: twice(lambda y: literal(y) * W, x))
    x = X.clone().requires_grad_("grad" in name and "vmap" not in name)
    graph = record(step, x, mode=mode)
    with torch.no_grad():
        run, (compiled,) = compile(graph, x)
    assert nodes(compiled, twice) == nodes(graph, twice) > 0
    for sign in (1, -1):
        other = (x.detach() * sign).requires_grad_(x.requires_grad)
        same(run(other), step(other))


def test_the_halves_of_an_op_that_trains_whose_graphs_hold_a_tensor() -> None:
    twice, graphs = define_twice(), list[GraphModule]()

    def keep(graph: GraphModule, _: object) -> Function:
        graphs.append(graph)
        return cast("Function", make_boxed_func(graph.forward))

    x = X.clone().requires_grad_()
    aot_function(lambda x: twice(lambda y: literal(y @ y), x), keep)(x).sum().backward()
    for graph in graphs:
        inputs = [torch.ones(node.meta["val"].shape) for node in graph.graph.find_nodes(op="placeholder")]
        batch = (torch.linspace(0.0, 1.0, 3 * 16).reshape(3, 4, 4), *inputs[1:])
        over = torch.vmap(graph.forward, in_dims=(0, *[None] * len(inputs[1:])))
        with torch.no_grad():
            for function, given in ((graph, inputs), (record(over, *batch), batch)):
                run, (compiled,) = compile(function, *given)
                assert nodes(compiled, twice) == 1
                same(run(*given), graph(*given) if function is graph else over(*given))


def test_a_body_that_has_changed_warns() -> None:
    graph = record(define_once_more(), X)

    @hopkit.define("t_once", replace=True)
    def again(body: Subgraph, *xs: Tensor) -> Tensor:
        return body(*xs) * 5

    with pytest.warns(HopkitWarning, match="'t_once' was recorded with another body"):
        run, _ = compile(graph, X)
    same(run(X), X.sin() * 5)


def define_once_more() -> Function:
    once = define_once()
    return lambda x: once(torch.sin, x)
