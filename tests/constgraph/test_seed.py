"""hopkit's ``run_const_graph`` against torch's own, cell by cell, on the same inputs."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch.fx import GraphModule, Node, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit._torch import trees
from hopkit._torch.fakes import FakeMode
from hopkit_constgraph import run_const_graph
from hopkit_constgraph.samples import samples

Operator = Callable[..., object]
Args = tuple[object, ...]

OURS: Operator = run_const_graph
THEIRS: Operator = torch.ops.higher_order.run_const_graph
TARGETS = {THEIRS: "run_const_graph", torch.ops.higher_order.constgraph_run: "run_const_graph"}


def several(weight: torch.Tensor, bias: torch.Tensor) -> object:
    return weight.sin() + bias, [weight * 2, (bias.exp(),)], {"sum": weight.sum()}


def passing(weight: torch.Tensor, bias: torch.Tensor) -> object:
    return weight, weight + bias, bias


def numbers(weight: torch.Tensor, rows: int, scale: float, keep: bool) -> object:
    return weight[:rows] * scale + keep


def view(weight: torch.Tensor) -> object:
    return weight.t()


def bare(weight: torch.Tensor) -> object:
    return weight.relu()


def nothing(weight: torch.Tensor) -> object:
    return None, weight.neg()


def integers(weight: torch.Tensor) -> object:
    return weight.argmax(), weight.cos()


class Pair(NamedTuple):
    """A named tuple is kept as it is."""

    left: torch.Tensor
    right: torch.Tensor


def nested(both, scale, many):  # type: ignore[no-untyped-def] # torch.fx keeps annotations as text, and cannot pickle it
    return both[0] * scale + both[1] * many[0]


def deep(named, many):  # type: ignore[no-untyped-def] # as above
    return named["w"]["left"] * many[0][1] + named[0], many[1]


def pair(both: Pair, many: list[Pair]) -> object:
    return both.left + many[0].right


def constants(weight: torch.Tensor, some: tuple[int, float, bool], named: dict[str, Any]) -> object:
    return (weight[: some[0]] * some[1] + some[2]).to(named["dtype"]).sum(named["dims"])


def absent(weight: torch.Tensor, nothing: None, some: tuple[torch.Tensor, None], none: tuple[()]) -> object:
    return weight + some[0], some[1]


def containers(ordered: OrderedDict[str, torch.Tensor], pair: tuple[torch.Tensor, torch.Tensor]) -> object:
    return ordered["right"] * pair[1] + pair[0].sum()


def passing_nested(both: tuple[torch.Tensor, torch.Tensor]) -> object:
    return both, both[0] * 2


def matrix() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, 6).reshape(2, 3)


def bias() -> torch.Tensor:
    return torch.tensor([0.5, -0.25, 2.0])


SMALL: Mapping[Operator, Args] = {
    several: (matrix(), bias()),
    passing: (matrix(), bias()),
    numbers: (matrix(), 1, 0.5, True),
    view: (matrix(),),
    bare: (matrix(),),
    nothing: (matrix(),),
    integers: (matrix(),),
    nested: ((matrix(), bias()), 2.0, [bias()]),
    deep: ({"w": {"left": matrix()}, 0: bias()}, [(matrix(), bias()), matrix()]),
    pair: (Pair(matrix(), bias()), [Pair(matrix(), bias())]),
    constants: (matrix(), (1, 0.5, True), {"dtype": torch.float64, "dims": [0, 1]}),
    absent: (matrix(), None, (bias(), None), ()),
    containers: (OrderedDict(left=matrix(), right=bias()), torch.linalg.qr(matrix())),
    passing_nested: ((matrix(), bias()),),
}


@functools.cache
def cases() -> Mapping[str, tuple[GraphModule, Args]]:
    """Graphs with their weights: small ones, and those of real models."""
    found = {f.__name__: (symbolic_trace(f), args) for f, args in SMALL.items()}
    models = {sample.name: cast("tuple[GraphModule, Args]", sample.args) for sample in samples()}
    return {**found, **models}


MODELS = ("weight-normalised transformer encoder layer", "batch norm folded into a convolution", "LoRA merge")


@pytest.fixture(params=[*(f.__name__ for f in SMALL), *MODELS])
def case(request: pytest.FixtureRequest) -> tuple[GraphModule, Args]:
    return cases()[request.param]


def each(fn: Callable[[torch.Tensor], torch.Tensor], args: Args) -> Args:
    return cast("Args", trees.map_only(torch.Tensor, fn, args))


def clones(args: Args, *, grad: bool = False) -> Args:
    return each(lambda tensor: tensor.detach().clone().requires_grad_(grad), args)


def on(operator: Operator, graph: GraphModule, args: Args) -> Callable[..., object]:
    """The call as a function of its tensors; everything else stays where it is."""

    def run(*tensors: torch.Tensor) -> object:
        given = iter(tensors)
        return operator(graph, each(lambda _: next(given), args))

    return run


def tensors(args: Args) -> list[torch.Tensor]:
    return [leaf for leaf in trees.leaves(args) if isinstance(leaf, torch.Tensor)]


def described(graph: GraphModule) -> list[object]:
    """A graph node for node, with numbers in place of names, and the code of every submodule."""
    position = {node: f"%{i}" for i, node in enumerate(graph.graph.nodes)}

    def told(node: Node) -> tuple[object, ...]:
        target = node.target if isinstance(node.target, str) else TARGETS.get(node.target, node.target)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: position[n])
        return node.op, target, args, kwargs, [position[user] for user in node.users]

    return [*map(told, graph.graph.nodes), {name: module.code for name, module in children(graph)}]


def children(graph: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    for name, module in graph.named_children():
        assert isinstance(module, GraphModule)
        yield name, module


def same(ours: object, theirs: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_eager(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    same(run_const_graph(graph, args), THEIRS(graph, args))


def test_eager_returns_a_weight_as_itself(case: tuple[GraphModule, Args]) -> None:
    graph, args = cases()["passing"]
    ours, theirs = run_const_graph(graph, args), THEIRS(graph, args)
    for result in (ours, theirs):
        first, _, last = cast("tuple[object, ...]", result)
        assert first is args[0]
        assert last is args[1]


@pytest.mark.parametrize("pre_dispatch", [False, True], ids=["", "pre_dispatch"])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_recorded_graph(
    case: tuple[GraphModule, Args], tracing_mode: Literal["real", "fake", "symbolic"], pre_dispatch: bool
) -> None:
    graph, args = case
    record = functools.partial(make_fx, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)
    ours, theirs = (record(on(operator, graph, args))(*tensors(args)) for operator in (run_const_graph, THEIRS))
    assert described(ours) == described(theirs)
    assert ours._const_graph is theirs._const_graph is graph
    same(ours(*tensors(args)), theirs(*tensors(args)))


def test_recorded_graph_of_a_call_by_keyword(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    by_keyword = make_fx(on(lambda g, a: run_const_graph(graph=g, args=a), graph, args))(*tensors(args))
    theirs = make_fx(on(lambda g, a: THEIRS(graph=g, args=a), graph, args))(*tensors(args))
    assert described(by_keyword) == described(theirs)


@pytest.mark.parametrize(
    "again", [lambda graph: graph, lambda graph: torch.fx.Interpreter(graph).run], ids=["", "interpreted"]
)
@pytest.mark.parametrize("change", [lambda run: run, torch.func.functionalize], ids=["", "functionalized"])
def test_graph_recorded_again(
    case: tuple[GraphModule, Args],
    again: Callable[[GraphModule], Callable[..., object]],
    change: Callable[[Callable[..., object]], Callable[..., object]],
) -> None:
    graph, args = case
    ours, theirs = (make_fx(on(operator, graph, args))(*tensors(args)) for operator in (run_const_graph, THEIRS))
    ours, theirs = (make_fx(change(again(recorded)))(*tensors(args)) for recorded in (ours, theirs))
    assert described(ours) == described(theirs)
    same(ours(*tensors(args)), theirs(*tensors(args)))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ["nested", "deep"])
def test_copied_graph(name: str, copied: Callable[[GraphModule], GraphModule]) -> None:
    graph, args = cases()[name]
    ours, theirs = (copied(make_fx(on(f, graph, args))(*tensors(args))) for f in (run_const_graph, THEIRS))
    assert described(ours) == described(theirs)
    same(ours(*tensors(args)), theirs(*tensors(args)))


def test_recorded_graph_of_a_list_of_arguments() -> None:
    graph = symbolic_trace(nested)

    def run(operator: Operator) -> GraphModule:
        return make_fx(lambda w, b: operator(graph, [(w, b), 2.0, (b,)]))(matrix(), bias())

    ours, theirs = run(OURS), run(THEIRS)
    assert described(ours) == described(theirs)
    same(ours(matrix(), bias()), theirs(matrix(), bias()))


FIRST_ROWS = symbolic_trace(lambda weight, rows: weight[:rows] + rows)
FIRST_ROWS_NESTED = symbolic_trace(lambda weight, some: weight[: some[0][0]] + some[0][0])


@pytest.mark.parametrize(
    ("graph", "wrap"),
    [(FIRST_ROWS, lambda rows: rows), (FIRST_ROWS_NESTED, lambda rows: [(rows,)])],
    ids=["", "nested"],
)
def test_recorded_graph_with_a_symbolic_number(graph: GraphModule, wrap: Callable[[int], object]) -> None:
    def run(operator: Operator) -> GraphModule:
        return make_fx(lambda w: operator(graph, (w, wrap(w.shape[0] - 1))), tracing_mode="symbolic")(matrix())

    ours, theirs = run(run_const_graph), run(THEIRS)
    assert described(ours) == described(theirs)
    larger = torch.cat([matrix(), matrix()])
    same(ours(larger), graph(larger, wrap(3)))


def test_fake(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    with FakeMode() as mode:
        fakes = each(mode.from_tensor, args)
        ours, theirs = run_const_graph(graph, fakes), THEIRS(graph, fakes)
    facts = [trees.map_leaves(fact, result) for result in (ours, theirs)]
    assert facts[0] == facts[1]


def fact(leaf: object) -> object:
    return (type(leaf), leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def test_functionalized(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    ours, theirs = (torch.func.functionalize(on(f, graph, args))(*tensors(args)) for f in (run_const_graph, THEIRS))
    same(ours, theirs)


def test_functionalized_graph(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    ours, theirs = (
        make_fx(torch.func.functionalize(on(operator, graph, args)))(*tensors(args))
        for operator in (run_const_graph, THEIRS)
    )
    assert described(ours) == described(theirs)
    same(ours(*tensors(args)), theirs(*tensors(args)))


@pytest.mark.parametrize("operator", [run_const_graph, THEIRS], ids=["ours", "theirs"])
def test_functionalized_graph_does_not_see_what_is_written_to_a_weight_that_comes_back(operator: Operator) -> None:
    """The documented limit of keeping the node; plain eager sees it."""
    graph = symbolic_trace(lambda weight: weight)

    def run(weight: torch.Tensor) -> torch.Tensor:
        cast("torch.Tensor", operator(graph, (weight,))).add_(1)
        return weight * 1

    recorded = make_fx(torch.func.functionalize(run))(matrix())
    same(run(matrix()), matrix() + 1)
    same(recorded(matrix()), matrix())


def test_ahead_of_time_graph(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    graphs: list[GraphModule] = []

    def keep(compiled: GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(compiled)
        return cast("Callable[..., object]", make_boxed_func(compiled.forward))

    ours, theirs = (
        aot_function(on(operator, graph, args), fw_compiler=keep)(*tensors(args))
        for operator in (run_const_graph, THEIRS)
    )
    assert described(graphs[0]) == described(graphs[1])
    same(ours, theirs)


def test_outputs_ask_for_gradients(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    ours, theirs = run_const_graph(graph, clones(args, grad=True)), THEIRS(graph, clones(args, grad=True))
    assert flags(ours) == flags(theirs)


def test_without_gradients_nothing_asks_for_them(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    with torch.no_grad():
        ours, theirs = run_const_graph(graph, clones(args, grad=True)), THEIRS(graph, clones(args, grad=True))
    assert flags(ours) == flags(theirs)


def flags(result: object) -> list[bool]:
    return [leaf.requires_grad for leaf in trees.leaves(result) if isinstance(leaf, torch.Tensor)]


def test_backward_raises(case: tuple[GraphModule, Args]) -> None:
    graph, args = case
    messages = []
    for operator in (run_const_graph, THEIRS):
        result = trees.leaves(operator(graph, clones(args, grad=True)))
        loss = sum(leaf.sum() for leaf in result if isinstance(leaf, torch.Tensor) and leaf.requires_grad)
        with pytest.raises(RuntimeError) as caught:
            cast("torch.Tensor", loss).backward()
        messages.append(str(caught.value))
    assert messages == ["Autograd not implemented for constgraph_run", "Autograd not implemented for run_const_graph"]


@pytest.mark.parametrize("operator", [run_const_graph, THEIRS], ids=["ours", "theirs"])
def test_ahead_of_time_the_error_is_lost(operator: Operator) -> None:
    """The documented limit of a deferred error: AOTAutograd looks for a way from the outputs to the weight."""
    w = matrix().requires_grad_()

    def boxed(graph: GraphModule, inputs: object) -> Callable[..., object]:
        return cast("Callable[..., object]", make_boxed_func(graph.forward))

    result = aot_function(on(operator, symbolic_trace(bare), (w,)), fw_compiler=boxed)(w)
    result.sum().backward()
    assert w.grad is None
