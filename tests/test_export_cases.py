"""torch.export, with save and load, of what models do with ops: captures, nesting, loops, pytrees, and literals.

Every case is a function of a model's state ``m`` and an input; it is compared with what it gives in plain eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import Subgraph
from tests.recording import define_once, define_twice, nodes, plainly, record, same, trained
from tests.saving import again

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
]

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
OUTSIDE = torch.tensor([1.0, 2.0, 3.0, 4.0])


class State(torch.nn.Module):
    """What a case may use, and the case as ``forward``."""

    def __init__(self, case: Callable[..., object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case, self.once, self.twice = case, define_once(), define_twice()
        self.pair, self.pick, self.cut, self.scaled = define_pair(), define_pick(), define_cut(), define_scaled()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.tied = self.weight
        self.register_buffer("shift", torch.linspace(0.0, 0.2, 4))
        self.register_buffer("unsaved", torch.linspace(0.0, 0.3, 4), persistent=False)
        self.constant = torch.linspace(1.0, 2.0, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.inner = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()))

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.case(self, *args, **kwargs)


def define_pair() -> Any:
    @hopkit.define("t_pair")
    def pair(f: Subgraph, g: Subgraph, xs: dict[str, tuple[Tensor, float]], *, flip: bool = False) -> dict[str, Tensor]:
        a, b = f(xs["a"][0]) * xs["a"][1], g(xs["b"][0], by=xs["b"][1])
        return {"sum": a + b, "difference": b - a if flip else a - b}

    return pair


def define_pick() -> Any:
    def inputs(yes: Subgraph, no: Subgraph, x: Tensor) -> object:
        return (x,), (x,)

    def outputs(yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @hopkit.define("t_pick", inputs=inputs, outputs=outputs)
    def pick(yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
        return yes(x) if x.sum() > 0 else no(x)

    return pick


def define_cut() -> Any:
    @hopkit.define("t_cut")
    def cut(body: Subgraph, x: Tensor, n: int | torch.SymInt) -> Tensor:
        return body(x[:n]) * int(n)

    return cut


def define_scaled() -> Any:
    @hopkit.define("t_scaled")
    def scaled(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])

    return scaled


def loop(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = m.twice(lambda y, layer=layer: layer(y).tanh(), x)
    return x


def literal(y: Tensor) -> Tensor:
    return y.sin() * torch.tensor([1.0, 2.0, 3.0, 4.0])


CASES: dict[str, tuple[int, Callable[..., object]]] = {
    "parameter": (1, lambda m, x: m.twice(lambda y: y * m.weight, x)),
    "tied parameter": (1, lambda m, x: m.twice(lambda y: y * m.weight + m.tied, x)),
    "buffer": (1, lambda m, x: m.twice(lambda y: y * m.shift, x)),
    "buffer that is not saved": (1, lambda m, x: m.twice(lambda y: y * m.unsaved, x)),
    "constant of the model": (1, lambda m, x: m.twice(lambda y: y * m.constant, x)),
    "constant from outside": (1, lambda m, x: m.twice(lambda y: y * OUTSIDE, x)),
    "literal": (1, lambda m, x: m.twice(lambda y: y * torch.tensor([1.0, 2.0, 3.0, 4.0]), x)),
    "two literals": (1, lambda m, x: m.once(lambda y: (y + torch.tensor(2.0)) * torch.tensor([4, 3, 2, 1]), x)),
    "literal that is written to": (1, lambda m, x: m.once(lambda y: torch.tensor([1.0, 2.0, 3.0, 4.0]).mul_(y[0]), x)),
    "literal and captures": (1, lambda m, x: m.twice(lambda y: y * m.weight + torch.tensor(0.5) + m.shift, x)),
    "literal in two calls": (2, lambda m, x: [m.once(lambda y, c=c: y * torch.tensor(c), x) for c in (2.0, 3.0)]),
    "same literal in two calls": (2, lambda m, x: m.once(literal, x) + m.once(literal, x.cos())),
    "literal on two shapes": (1, lambda m, x: m.twice(lambda y: y.sum(-1) * torch.tensor(2.0), x)),
    "literal in the body": (1, lambda m, x: m.scaled(torch.sin, x)),
    "submodule": (1, lambda m, x: m.twice(m.layers[0], x)),
    "graph module": (1, lambda m, x: m.twice(m.inner, x)),
    "loop": (2, loop),
    "op in an op": (2, lambda m, x: m.twice(lambda y: m.once(lambda z: z.sin() * m.weight, y) + m.shift, x)),
    "literal in an op in an op": (2, lambda m, x: m.twice(lambda y: m.once(lambda z: z * torch.tensor(2.0), y), x)),
    "op in a branch": (
        2,
        lambda m, x: torch.cond(
            x.sum() > 0, lambda x: m.twice(lambda y: y * 2, x), lambda x: m.twice(torch.sin, x) * 1, (x,)
        ),
    ),
    "captures in a branch": (
        2,
        lambda m, x: torch.cond(
            x.sum() > 0, lambda x: m.twice(lambda y: y * m.weight, x), lambda x: m.once(m.layers[0], x), (x,)
        ),
    ),
    "pytrees": (1, lambda m, x: m.pair(torch.sin, lambda y, by: y * by, {"a": (x, 2.0), "b": (m.weight, 0.5)})),
    "keywords": (
        1,
        lambda m, x: m.pair(g=lambda y, by: y * by, xs={"a": (x, 2.0), "b": (x, 0.5)}, f=m.inner, flip=True),
    ),
    "same operand twice": (1, lambda m, x: m.once(lambda a, b: a * b, x, x)),
    "decides on a value": (1, lambda m, x: m.pick(lambda y: y * m.weight, torch.cos, x)),
    "size as an operand": (1, lambda m, x: m.cut(torch.sin, x, x.shape[0])),
    "only constants": (1, lambda m, x: x + m.once(lambda w: w * 2, m.weight)),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_model_goes_round(name: str, strict: bool) -> None:
    count, case = CASES[name]
    model = State(case)
    program = torch.export.export(model, (X,), strict=strict)
    _check(model, program, count, [X, -X])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "name", ["literal and captures", "literal in an op in an op", "loop", "op in a branch", "pytrees"]
)
def test_sizes_that_vary_go_round(name: str, strict: bool) -> None:
    count, case = CASES[name]
    model = State(case)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes={"args": ({0: rows},)}, strict=strict)
    _check(model, program, count, [X, -X[:2], torch.cat([X, X])])


class Calls(torch.nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.functions = [function]

    def forward(self, *args: object) -> object:
        return self.functions[0](*args)


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., object]]] = {
    "grad": trained,
    "second grad": lambda f: trained(f, second=True),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum())),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_recorded_transform_with_a_literal_goes_round(name: str) -> None:
    once = define_once()
    graph = record(TRANSFORMS[name](lambda x: once(literal, x)), X.clone().requires_grad_(name != "vmap of grad"))
    # Not the model's own: torch loses a constant of a module in a module in a model.
    program = torch.export.export(Calls(graph), (X,), strict=False)
    for found in (program, again(program), program.run_decompositions()):
        assert nodes(found.graph_module, once) == nodes(graph, once) > 0
        for x in (X, -X):
            same(found.module()(x), graph(x))


WRITES: dict[str, tuple[int, Callable[[Any, Tensor], Tensor]]] = {
    "and gives something else": (1, lambda fresh, x: fresh(lambda y: y.mul_(2).sin(), x)),
    "and gives the argument": (1, lambda fresh, x: fresh(lambda y: y.mul_(2), x)),
    "a part of it": (1, lambda fresh, x: fresh(lambda y: (y[0].mul_(3), y * 2)[1], x)),
    "in an op in an op": (2, lambda fresh, x: fresh(lambda y: fresh(lambda z: z.add_(1).sin(), y).mul_(3), x)),
    "what it sees twice": (0, lambda fresh, x: fresh(lambda y, z: y.mul_(2) + z, x, True)),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_a_subgraph_that_writes_to_what_the_body_made(name: str, strict: bool) -> None:
    @hopkit.define("t_fresh")
    def fresh(body: Subgraph, x: Tensor, twice: bool = False) -> Tensor:
        y = x * 1
        return body(y, y[0]) + y if twice else body(y) + y

    count, case = WRITES[name]
    model = State(lambda m, x: case(fresh, x * m.weight))
    program = torch.export.export(model, (X,), strict=strict).run_decompositions()
    for found in (program, again(program), again(program).run_decompositions()):
        assert nodes(found.graph_module, fresh) == count
        for x in (X, -X):
            same(trained(found.module())(x.clone().requires_grad_()), trained(model)(x.clone().requires_grad_()))


def _check(model: State, program: torch.export.ExportedProgram, count: int, inputs: list[Tensor]) -> None:
    for found in (program, again(program)):
        assert sum(nodes(found.graph_module, op) for op in hopkit.ops().values()) == count
        assert set(found.state_dict) <= set(model.state_dict())
        for x in inputs:
            same(found.module()(x), plainly(model, x))
