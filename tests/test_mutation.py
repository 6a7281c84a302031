"""Declared mutation: one node that writes to its operand, in every graph, and functional where a graph must be."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import (  # type: ignore[import-untyped] # torch's own
    aot_function,
    aot_module_simplified,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

import hopkit
from hopkit import Op, Subgraph
from hopkit._torch import trees
from hopkit._torch.inductor import written
from hopkit.errors import AutogradError
from tests.recording import nodes, plainly, record, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's, of its own code
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
]

Function = Callable[..., Any]


def define_kernel() -> Op[..., None]:
    @hopkit.define("t_kernel", mutates=("out",))
    def kernel(body: Subgraph[None], out: Tensor, x: Tensor) -> None:
        body(out, x)

    return kernel


def define_update() -> Op[..., Tensor]:
    @hopkit.define("t_update", mutates=("x",))
    def update(body: Subgraph, x: Tensor, y: Tensor) -> Tensor:
        x.add_(body(y))
        return body(x)

    return update


def inputs() -> list[Tensor]:
    return [torch.linspace(-1.0, 1.0, 9).reshape(3, 3), torch.linspace(0.5, 1.5, 9).reshape(3, 3)]


def leaves() -> list[Tensor]:
    return [t.requires_grad_() for t in inputs()]


def compare(function: Function, recorded: Function, make: Callable[[], list[Tensor]] = inputs) -> None:
    """The results, and what is in the arguments afterwards."""
    mine, others = make(), make()
    same((recorded(*mine), mine), (plainly(function, *others), others))


def ahead(function: Function) -> tuple[Function, list[GraphModule]]:
    """``function`` under AOTAutograd, and the graphs that it makes."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_function(function, keep), graphs


def compiled(function: Function) -> tuple[Function, list[GraphModule], list[GraphModule]]:
    """``function`` under torch.compile; Dynamo's graphs, and AOTAutograd's."""
    first: list[GraphModule] = []
    then: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> object:
        then.append(graph)
        return make_boxed_func(graph.forward)

    def backend(graph: GraphModule, examples: list[Tensor]) -> object:
        first.append(graph)
        return aot_module_simplified(graph, examples, fw_compiler=keep)

    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True), first, then


def functional(graph: GraphModule) -> list[object]:
    """What torch's own functional nodes hold."""
    return [n.args[0] for n in graph.graph.nodes if n.target is torch.ops.higher_order.auto_functionalized_v2]


def fill(out: Tensor, x: Tensor) -> None:
    out.copy_(x.sin())
    out.mul_(2)


# Uses of the two ops that write, each a function of two tensors.
def a_kernel(kernel: Function, update: Function, out: Tensor, x: Tensor) -> Tensor:
    kernel(fill, out, x)
    return out + 1


def body_and_subgraph(kernel: Function, update: Op[..., Tensor], out: Tensor, x: Tensor) -> Tensor:
    y = update(lambda y: y * x, out, x)
    return y + out


def views(kernel: Function, update: Function, out: Tensor, x: Tensor) -> Tensor:
    kernel(fill, out[0], x[1])
    kernel(lambda o, y: o.add_(y * x[2]), out.t(), x)
    kernel(fill, out[:, ::2], x[:, 1:])
    return out * out


def in_a_loop(kernel: Function, update: Function, out: Tensor, x: Tensor) -> Tensor:
    for i in range(3):
        kernel(lambda o, y, i=i: o.mul_(2).add_(y * i), out, x)
    return out.sum()


def a_temporary(kernel: Function, update: Function, out: Tensor, x: Tensor) -> Tensor:
    fresh = torch.empty_like(out)
    kernel(fill, fresh, x)
    return fresh * out


def one_after_another(kernel: Function, update: Function, out: Tensor, x: Tensor) -> Tensor:
    before = out * 1
    kernel(fill, out, x)
    between = out * 1
    kernel(lambda o, y: o.sub_(y), x, out)
    return before + between * x


USES: dict[str, Function] = {
    use.__name__: use for use in (a_kernel, body_and_subgraph, views, in_a_loop, a_temporary, one_after_another)
}


def bound(name: str) -> tuple[Function, list[Op[..., Any]]]:
    ops: list[Op[..., Any]] = [define_kernel(), define_update()]
    return lambda out, x: USES[name](*ops, out, x), ops


def kept(graphs: list[GraphModule], ops: list[Op[..., Any]]) -> int:
    return sum(nodes(graph, op) for graph in graphs for op in ops)


WRITES = {"a_kernel": 1, "body_and_subgraph": 1, "views": 3, "in_a_loop": 3, "a_temporary": 1, "one_after_another": 2}


@pytest.mark.parametrize("name", USES)
def test_make_fx_keeps_one_node(name: str) -> None:
    run, ops = bound(name)
    for options in ({}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}):
        graph = make_fx(run, **options)(*inputs())
        graph.graph.eliminate_dead_code()
        graph.recompile()
        assert kept([graph], ops) == WRITES[name]
        compare(run, graph)


@pytest.mark.parametrize("name", USES)
def test_functionalize_makes_the_node_a_function(name: str) -> None:
    run, ops = bound(name)
    compare(run, torch.func.functionalize(run))
    graph = make_fx(torch.func.functionalize(run))(*inputs())
    found = [n for n in graph.graph.nodes if n.target in [op.operator for op in ops]]
    assert len(found) == WRITES[name]
    assert all('"functional"' in n.kwargs["hopkit"] for n in found)
    compare(run, graph)


@pytest.mark.parametrize("name", USES)
def test_aot_autograd_has_torchs_own_node(name: str) -> None:
    run, ops = bound(name)
    recorded, graphs = ahead(run)
    compare(run, recorded)
    assert len(functional(graphs[0])) == WRITES[name]
    assert set(functional(graphs[0])) <= {op.operator for op in ops}
    compare(run, recorded)


@pytest.mark.parametrize("name", USES)
def test_dynamo_keeps_one_node_and_hands_it_on(name: str) -> None:
    run, ops = bound(name)
    recorded, first, then = compiled(run)
    with torch.no_grad():
        compare(run, recorded)
    assert kept(first, ops) == WRITES[name]
    assert len(functional(then[0])) == WRITES[name]


@pytest.mark.parametrize("name", USES)
def test_inductor_writes_to_the_buffer(name: str) -> None:
    run, _ = bound(name)
    torch.compiler.reset()
    with torch.no_grad():
        compare(run, torch.compile(run, fullgraph=True))


def test_inductor_writes_without_a_copy() -> None:
    kernel = define_kernel()
    torch.compiler.reset()

    def run(out: Tensor, x: Tensor) -> None:
        kernel(fill, out, x)

    mine, x = inputs()
    with torch.no_grad():
        _, code = written(torch.compile(run, fullgraph=True), mine, x)
    same(mine, x.sin() * 2)
    assert code.count("empty_strided_cpu(") == 0


# Uses that eager autograd permits: what is written to is no leaf.
def through_a_view(kernel: Function, update: Function, out: Tensor, x: Tensor) -> Tensor:
    out = out * 2
    kernel(lambda o, y: o.mul_(y).sin_(), out, x)
    kernel(fill, out[0], x[0])
    return out * out


def saved_before(kernel: Function, update: Op[..., Tensor], out: Tensor, x: Tensor) -> Tensor:
    out = out.sin()
    y = update(lambda y: y * x, out.clone(), x)
    return y + out


def into_a_buffer(kernel: Function, update: Function, out: Tensor, x: Tensor) -> Tensor:
    fresh = torch.empty_like(x)
    kernel(fill, fresh, x)
    return fresh * out


def what_needs_none(kernel: Function, update: Function, out: Tensor, x: Tensor) -> Tensor:
    counter = torch.zeros(3, dtype=torch.int64)
    kernel(lambda o, y: o.add_((y > 0).sum(0)), counter, x)
    return out * x * counter


TRAINED: dict[str, Function] = {
    use.__name__: use for use in (through_a_view, saved_before, into_a_buffer, what_needs_none)
}
TRAINERS: dict[str, Callable[[Function], Function]] = {
    "eager": trained,
    "make_fx": lambda run: make_fx(trained(run))(*leaves()),
    "aot": lambda run: trained(ahead(run)[0]),
    "compile": lambda run: trained(compiled(run)[0]),
    "inductor": lambda run: trained(torch.compile(run, fullgraph=True)),
}


@pytest.mark.parametrize(
    ("name", "trainer"),
    [
        *itertools.product(TRAINED, [trainer for trainer in TRAINERS if trainer != "inductor"]),
        *((name, "inductor") for name in ("through_a_view", "saved_before")),
    ],
)
def test_gradients(name: str, trainer: str) -> None:
    ops: list[Op[..., Any]] = [define_kernel(), define_update()]

    def run(out: Tensor, x: Tensor) -> Tensor:
        result: Tensor = TRAINED[name](*ops, out, x)
        return result

    torch.compiler.reset()
    same(TRAINERS[trainer](run)(*leaves()), plainly(trained(run), *leaves()))


def test_a_graph_that_trains_has_a_node_for_each_half() -> None:
    kernel = define_kernel()

    def run(out: Tensor, x: Tensor) -> Tensor:
        out = out * 2
        kernel(lambda o, y: o.mul_(y).sin_(), out, x)
        return out * out

    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    recorded = aot_function(run, keep, partition_fn=min_cut_rematerialization_partition)
    same(trained(recorded)(*leaves()), plainly(trained(run), *leaves()))
    forward, backward = graphs
    assert nodes(forward, kernel) == nodes(backward, kernel) == 1
    assert not functional(forward)


def test_a_second_derivative() -> None:
    update = define_update()

    def run(out: Tensor, x: Tensor) -> Tensor:
        return update(lambda y: (y * x).sin(), out * 2, x)

    same(record(trained(run, second=True), *leaves())(*leaves()), plainly(trained(run, second=True), *leaves()))


@pytest.mark.parametrize("recorder", ["make_fx", "compile"])
def test_a_leaf_that_requires_a_gradient_is_refused_as_in_eager(recorder: str) -> None:
    kernel = define_kernel()
    recorders: dict[str, Function] = {
        "make_fx": lambda run: make_fx(run)(*leaves()),
        "compile": lambda run: compiled(run)[0](*leaves()),
    }
    warnings.simplefilter("ignore", hopkit.HopkitWarning)  # its body cannot be rehearsed
    with pytest.raises(Exception, match="leaf Variable that requires grad"):
        recorders[recorder](lambda out, x: kernel(fill, out, x))


def test_a_parameter_is_written_to_where_gradients_are_off() -> None:
    kernel = define_kernel()

    def step(weight: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            kernel(lambda w, g: w.sub_(g, alpha=0.1), weight, gradient)

    for recorded in (record(step, *leaves()), ahead(step)[0], compiled(step)[0]):
        mine, others = leaves(), leaves()
        with torch.no_grad():
            recorded(*mine)
        step(*others)
        same(mine, others)


# Inputs that share memory: copies of them would be two.
@pytest.mark.parametrize(
    "use",
    [
        lambda kernel, out, x: kernel(lambda o, y: o.add_(y.clone()), out, out[0].expand(3, 3)),
        lambda kernel, out, x: kernel(lambda o, y: o.add_(y + out), out, x),
        lambda kernel, out, x: kernel(lambda o, y: o.add_(y), out, out),
        lambda kernel, out, x: kernel(lambda o, y: o.add_(y), out[0], out[1]),
    ],
)
def test_inputs_that_share_memory(use: Function) -> None:
    kernel = define_kernel()

    def run(out: Tensor, x: Tensor) -> Tensor:
        out = out * 2
        use(kernel, out, x)
        return out * x

    torch.compiler.reset()
    for recorded in (record(run, *inputs()), ahead(run)[0], compiled(run)[0], torch.compile(run, fullgraph=True)):
        compare(run, recorded)
    same(trained(ahead(run)[0])(*leaves()), plainly(trained(run), *leaves()))


def test_a_pytree_with_options() -> None:
    @hopkit.define("t_tree", mutates=("state",))
    def tree(
        body: Subgraph[None], state: dict[str, Tensor], x: Tensor, *, times: int = 2, to: torch.dtype = torch.float64
    ) -> tuple[Tensor, None, int]:
        for _ in range(times):
            body(state["a"], x)
        state["b"].sub_(state["a"].to(to))
        return state["a"] * x, None, times

    def run(out: Tensor, x: Tensor) -> object:
        state = {"a": out.t(), "b": x.clone()}
        return tree(lambda a, y: a.add_(y * 2), state, x, times=3), state

    recorded, graphs = ahead(lambda out, x: trees.leaves(run(out, x)))
    mine, others = inputs(), inputs()
    same((recorded(*mine), mine), (trees.leaves(plainly(run, *others)), others))
    assert functional(graphs[0]) == [tree.operator]


def test_the_result_of_a_subgraph_that_gives_back_what_it_wrote_to() -> None:
    @hopkit.define("t_back", mutates=("out",))
    def back(body: Subgraph, out: Tensor, x: Tensor) -> Tensor:
        result = body(out, x)
        result.mul_(3)
        out.add_(1)
        return result * x

    def run(out: Tensor, x: Tensor) -> Tensor:
        return back(lambda o, y: o.add_(y), out, x) + out

    for recorded in (record(run, *inputs()), make_fx(torch.func.functionalize(run))(*inputs()), ahead(run)[0]):
        compare(run, recorded)
    compare(run, compiled(run)[0])


def test_what_a_subgraph_writes_to_a_temporary_of_the_body() -> None:
    @hopkit.define("t_temporary")
    def temporary(body: Subgraph, x: Tensor) -> Tensor:
        fresh = x.clone()
        result = body(fresh[0], x[1])
        result.mul_(3)
        return fresh * 2

    def run(out: Tensor, x: Tensor) -> Tensor:
        return temporary(lambda t, y: t.add_(y * x[0]), out)

    recorded, graphs = ahead(run)
    compare(run, recorded)
    assert nodes(graphs[0], temporary) == 1
    compare(run, make_fx(torch.func.functionalize(run))(*inputs()))


def test_a_view_that_a_subgraph_gives_of_what_is_written_to() -> None:
    @hopkit.define("t_view", mutates=("out",))
    def view(body: Subgraph, out: Tensor, x: Tensor) -> Tensor:
        first = body(out, x)
        out.mul_(2)
        return first * x

    def run(out: Tensor, x: Tensor) -> Tensor:
        return view(lambda o, y: o.add_(y)[0], out, x)

    recorded = ahead(run)[0]
    with pytest.warns(hopkit.HopkitWarning, match="a view that a subgraph gives of what it is given"):
        compare(run, recorded)


def test_within_a_subgraph_of_another_op() -> None:
    kernel = define_kernel()

    @hopkit.define("t_outer")
    def outer(body: Subgraph, x: Tensor) -> Tensor:
        return body(body(x)) * 2

    def run(out: Tensor, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            fresh = y.clone()
            kernel(lambda o, z: o.mul_(z * x), fresh, y)
            return fresh

        return outer(inner, out) + out

    torch.compiler.reset()
    for recorded in (record(run, *inputs()), ahead(run)[0], compiled(run)[0], torch.compile(run, fullgraph=True)):
        compare(run, recorded)
    same(trained(ahead(run)[0])(*leaves()), plainly(trained(run), *leaves()))


def test_a_body_that_decides_on_values() -> None:
    @hopkit.define(
        "t_decide", mutates=("x",), inputs=lambda body, x: ((x,),), outputs=lambda body, x: torch.empty_like(x)
    )
    def decide(body: Subgraph, x: Tensor) -> Tensor:
        if x.sum() > 1:
            x.mul_(2)
        else:
            x.add_(7)
        return body(x)

    def run(out: Tensor, x: Tensor) -> Tensor:
        return decide(torch.sin, out) + out + decide(lambda y: y * out, x)

    torch.compiler.reset()
    for recorded in (record(run, *inputs()), ahead(run)[0], compiled(run)[0]):
        compare(run, recorded)
    with torch.no_grad():
        compare(run, torch.compile(run, fullgraph=True))


@pytest.mark.parametrize("autograd", ["deferred_error", "error"])
def test_policies(autograd: Any) -> None:
    @hopkit.define("t_policy", mutates=("out",), autograd=autograd)
    def policy(body: Subgraph[None], out: Tensor, x: Tensor) -> None:
        body(out, x)

    def run(out: Tensor, x: Tensor) -> Tensor:
        out = out * 1
        policy(fill, out, x)
        return out * x

    compare(run, record(run, *inputs()))
    compare(run, ahead(run)[0])
    if autograd == "error":
        with pytest.raises(AutogradError, match="t_policy"):
            run(*leaves())
    else:  # what is written to is no output of the op
        same(trained(ahead(run)[0])(*leaves()), plainly(trained(run), *leaves()))


def test_a_kernel_by_hand_writes_too() -> None:
    kernel, asked = define_kernel(), []

    @kernel.rule("device")
    def by_hand(body: Subgraph[None], out: Tensor, x: Tensor) -> None:
        asked.append(1)
        body(out, x)

    def run(out: Tensor, x: Tensor) -> Tensor:
        kernel(fill, out, x)
        return out + x

    recorded, graphs = ahead(run)
    with torch.no_grad():
        for function in (run, record(run, *inputs()), recorded):
            compare(run, function)
            assert asked
            asked.clear()
    assert functional(graphs[0]) == [kernel.operator]
    same(trained(lambda out, x: run(out * 1, x))(*leaves()), plainly(trained(lambda o, x: run(o * 1, x)), *leaves()))


def test_a_derivative_by_hand_is_not_asked_for_a_call_that_writes() -> None:
    kernel = define_kernel()

    @kernel.rule("autograd")
    class Wrong:
        @staticmethod
        def forward(body: Subgraph[None], out: Tensor, x: Tensor) -> tuple[None, object]:
            raise AssertionError

        @staticmethod
        def backward(saved: object, *gradients: Tensor | None) -> tuple[None, None]:
            raise AssertionError

    def run(out: Tensor, x: Tensor) -> Tensor:
        out = out * 1
        kernel(fill, out, x)
        return out * x

    same(trained(run)(*leaves()), plainly(trained(run), *leaves()))
    same(trained(ahead(run)[0])(*leaves()), plainly(trained(run), *leaves()))


class Model(torch.nn.Module):
    """Writes to a buffer of its own."""

    def __init__(self, kernel: Function) -> None:
        super().__init__()
        self.kernel = kernel
        self.total = torch.nn.Buffer(torch.zeros(3, 3))
        self.weight = torch.nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.kernel(lambda o, y: o.add_(y * self.weight).mul_(2), self.total, x)
        return self.total * x


def saved(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    kernel = define_kernel()
    x = inputs()[1]
    ways: list[Function] = [
        lambda program: program.module(),
        lambda program: saved(program).module(),
        lambda program: torch.export.unflatten(program),
        lambda program: program.run_decompositions().module(),
        lambda program: saved(program.run_decompositions()).module(),
    ]
    for way in ways:
        program = torch.export.export(Model(kernel), (x,), strict=strict)
        assert nodes(program.graph_module, kernel) == 1
        model, module = Model(kernel), way(program)
        with torch.no_grad():
            same((module(x), module(x)), (plainly(model, x), plainly(model, x)))
        same(dict(module.named_buffers())["total"], model.total)


def test_export_keeps_the_node_of_a_body_that_writes() -> None:
    update = define_update()

    class Update(torch.nn.Module):
        def forward(self, out: Tensor, x: Tensor) -> Tensor:
            return update(lambda y: y * x, out, x)

    program = torch.export.export(Update(), tuple(inputs())).run_decompositions()
    assert nodes(program.graph_module, update) == 1
    compare(Update(), saved(program).module())


def test_strict_export_of_sizes_that_turn_out_to_be_equal() -> None:
    kernel = define_kernel()

    class Fill(torch.nn.Module):
        def forward(self, out: Tensor, x: Tensor) -> Tensor:
            kernel(fill, out, x)
            return out + x

    dynamic = {1: torch.export.Dim("n", min=2)}
    program = torch.export.export(Fill(), tuple(inputs()), strict=True, dynamic_shapes=(dynamic, dynamic))
    assert nodes(program.graph_module, kernel) == 1
    compare(Fill(), program.module(), lambda: [torch.ones(3, 5), torch.linspace(0, 1, 15).reshape(3, 5)])


def test_dynamic_sizes() -> None:
    kernel = define_kernel()

    def run(out: Tensor, x: Tensor) -> Tensor:
        kernel(lambda o, y: o.add_(y * y.shape[0]), out[1:], x[1:])
        return out * out.shape[0]

    graph = make_fx(run, tracing_mode="symbolic")(torch.ones(4, 3), torch.ones(4, 3))
    torch.compiler.reset()
    recorded = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 5, 8):
        for function in (graph, recorded):
            compare(run, function, lambda size=size: [torch.ones(size, 3), torch.full((size, 3), 0.5)])  # type: ignore[misc] # ruff's default


def test_a_recorded_graph_is_recorded_again() -> None:
    kernel = define_kernel()
    graph = record(lambda out, x: a_kernel(kernel, kernel, out, x), *inputs())
    for again in (make_fx(graph)(*inputs()), make_fx(torch.func.functionalize(graph))(*inputs())):
        assert nodes(again, kernel) == 1
        compare(graph, again)
    recorded, graphs = ahead(graph)
    compare(graph, recorded)
    assert functional(graphs[0]) == [kernel.operator]


def test_what_is_declared_and_does_not_happen() -> None:
    @hopkit.define("t_never", mutates=("x",), aliases=("x",))
    def never(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    def run(out: Tensor, x: Tensor) -> Tensor:
        return never(torch.sin, out) * x

    recorded, graphs = ahead(run)
    compare(run, recorded)
    assert nodes(graphs[0], never) == 1
    assert not functional(graphs[0])
    same(trained(ahead(run)[0])(*leaves()), plainly(trained(run), *leaves()))


@pytest.mark.parametrize("name", USES)
def test_flatten(name: str) -> None:
    run, ops = bound(name)
    for graph in (make_fx(run)(*inputs()), make_fx(torch.func.functionalize(run))(*inputs())):
        flat = hopkit.flatten(graph)
        assert kept([flat], ops) == 0
        compare(run, flat)


def test_transforms_see_the_body() -> None:
    kernel = define_kernel()

    def run(out: Tensor, x: Tensor) -> Tensor:
        def one(o: Tensor, y: Tensor) -> Tensor:
            o = o * 1
            kernel(fill, o, y)
            return o * y

        slope: Tensor = torch.func.grad(lambda y: one(out, y).sum())(x)
        return torch.vmap(one)(out, x) + slope

    for recorded in (run, record(run, *inputs()), ahead(run)[0]):
        compare(run, recorded)


def test_an_option_that_is_called_as_torch_calls_an_input() -> None:
    @hopkit.define("t_named", mutates=("x",))
    def named(body: Subgraph, x: Tensor, *, input0: float = 3.0, graph0: int = 2) -> Tensor:
        x.mul_(input0)
        return body(x) * graph0

    def run(out: Tensor, x: Tensor) -> Tensor:
        return named(torch.sin, out) + x

    recorded, graphs = ahead(run)
    compare(run, recorded)
    assert nodes(graphs[0], named) == 1


# -- what is not declared --------------------------------------------------------------------------------------------


class Silent(torch.nn.Module):
    """Calls an op whose subgraph writes to its operand, which is not declared."""

    def __init__(self) -> None:
        super().__init__()

        @hopkit.define("t_silent")
        def silent(body: Subgraph, x: Tensor) -> Tensor:
            return body(x)

        self.op: Op[..., Tensor] = silent

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        out = out * 1
        return self.op(lambda y: y.add_(x), out) + out


UNDECLARED: dict[str, Callable[[Silent], Function]] = {
    "make_fx": lambda model: make_fx(model)(*inputs()),
    "make_fx functionalize": lambda model: make_fx(torch.func.functionalize(model))(*inputs()),
    "aot": lambda model: ahead(model)[0],
    "aot_eager": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "inductor": lambda model: torch.compile(model, fullgraph=True),
    "export": lambda model: torch.export.export(model, tuple(inputs())).module(),
    "strict export": lambda model: torch.export.export(model, tuple(inputs()), strict=True).module(),
    "run_decompositions": lambda model: torch.export.export(model, tuple(inputs())).run_decompositions().module(),
}


def recorded_and_run(recorder: str, model: Silent) -> None:
    torch.compiler.reset()
    compare(model, UNDECLARED[recorder](model))


@pytest.mark.parametrize("recorder", UNDECLARED)
def test_an_undeclared_write_is_right_and_warned_of(recorder: str) -> None:
    model = Silent()
    told = """op 't_silent' is not kept.*it writes to operand 'x'.*Declare `mutates=\\("x",\\)`"""
    with pytest.warns(hopkit.HopkitWarning, match=told) as caught:
        recorded_and_run(recorder, model)
    assert len({str(w.message) for w in caught if issubclass(w.category, hopkit.HopkitWarning)}) == 1


@pytest.mark.parametrize("recorder", UNDECLARED)
def test_an_undeclared_write_is_an_error_where_we_are_strict(recorder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Silent()
    monkeypatch.setenv("HOPKIT_STRICT", "1")
    with pytest.raises(Exception, match=r"op 't_silent'.*it writes to operand 'x'"):
        recorded_and_run(recorder, model)
    monkeypatch.delenv("HOPKIT_STRICT")
    kernel = define_kernel()  # what failed has left nothing behind
    graph = record(lambda out, x: a_kernel(kernel, kernel, out, x), *inputs())
    assert nodes(graph, kernel) == 1


# -- aliases ---------------------------------------------------------------------------------------------------------


def output_written(op: Function, x: Tensor, w: Tensor) -> object:
    row, rest = op(lambda y: (y[0], y * w), x)
    row.add_(1)
    return row, rest


def operand_written(op: Function, x: Tensor, w: Tensor) -> object:
    row, rest = op(lambda y: (y.t(), y * w), x)
    x.mul_(2)
    return row * 1, rest


def both_written(op: Function, x: Tensor, w: Tensor) -> object:
    x = x * 1
    flat, part = op(lambda y: (y.view(-1), y[1:]), x)
    flat.add_(1)
    x[0].mul_(3)
    part.sub_(w[1:])
    return x * 1, flat * 1, part * 1


def a_part_of_a_part(op: Function, x: Tensor, w: Tensor) -> object:
    part, _ = op(lambda y: (y[1:], y * w), x)
    smaller, rest = op(lambda y: (y[0], y + 1), part)
    smaller.fill_(7)
    return part * 1, rest


@pytest.mark.parametrize("declared", [(), ("x",)])
@pytest.mark.parametrize("use", [output_written, operand_written, both_written, a_part_of_a_part])
def test_outputs_that_are_views(use: Function, declared: tuple[str, ...]) -> None:
    @hopkit.define("t_pair", aliases=declared)
    def pair(body: Subgraph[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        return body(x)

    def run(x: Tensor, w: Tensor) -> list[Tensor]:
        return list(use(pair, x, w))

    recorders: list[Callable[[], Function]] = [
        lambda: torch.func.functionalize(run),
        lambda: record(run, *inputs()),
        lambda: make_fx(run, pre_dispatch=True)(*inputs()),
        lambda: make_fx(torch.func.functionalize(run))(*inputs()),
        lambda: ahead(run)[0],
        lambda: torch.compile(run, backend="aot_eager", fullgraph=True),
    ]
    if declared and use in (both_written, a_part_of_a_part):
        recorders.append(lambda: torch.compile(run, fullgraph=True))
    for recorder in recorders:
        torch.compiler.reset()
        with warnings.catch_warnings():
            if not declared:  # tests/test_properties.py has the warnings
                warnings.simplefilter("ignore", hopkit.HopkitWarning)
            compare(run, recorder())


# -- schemas ---------------------------------------------------------------------------------------------------------


def schemas(graph: GraphModule, op: Op[..., Any]) -> list[Any]:
    def value(node: Node) -> Any:
        return graph.get_submodule(str(node.target)) if node.op == "get_attr" else node.meta["val"]

    calls = graph.graph.find_nodes(op="call_function", target=op.operator)
    return [op.operator.gen_schema(*map_arg(call.args, value), **call.kwargs) for call in calls]


def shown(graph: GraphModule, op: Op[..., Any]) -> list[str]:
    """The schemas of an op's nodes, without the layout."""
    return [str(schema).replace("(", " ").split("hopkit")[0] for schema in schemas(graph, op)]


def returned(graph: GraphModule, op: Op[..., Any]) -> list[int]:
    """How many outputs each node has, by its schema."""
    counts = []
    for schema in schemas(graph, op):
        kinds = [str(value.type) for value in schema.returns]
        counts.append(kinds[0].count("Tensor") if len(kinds) == 1 else len(kinds))
    return counts


def test_a_schema_marks_what_is_declared_and_counts_what_comes_out() -> None:
    @hopkit.define("t_wide", mutates=("xs",))
    def wide(
        body: Subgraph,
        others: tuple[Subgraph, ...],
        xs: list[Tensor],
        x: Tensor,
        *,
        a: int = 1,
        b: float = 2.0,
        c: str | None = None,
        to: torch.dtype = torch.float32,
        where: torch.device = torch.device("cpu"),  # noqa: B008 # a constant
        d: bool = True,
    ) -> dict[str, object]:
        xs[0].add_(body(x))
        return {"y": others[0](xs[1]), "none": None, "number": 3, "x": x, "z": others[1](x)}

    def run(out: Tensor, x: Tensor) -> object:
        return wide(torch.sin, (torch.cos, lambda y: y * out), [out, x], out * x)

    for options in ({}, {"tracing_mode": "symbolic"}):
        graph = make_fx(run, **options)(*inputs())  # type: ignore[arg-type] # options of several types
        (text,) = shown(graph, wide)
        assert text.startswith(
            "t_wide Any graph0, Any graph1, Any graph2, Tensor a3!) input0, Tensor a4!) input1, Tensor"
        )
        assert "int a, float b, NoneType c, int to, Device where, bool d" in text
        assert returned(graph, wide) == [2]


def test_a_schema_without_outputs() -> None:
    kernel = define_kernel()
    graph = record(lambda out, x: kernel(fill, out, x), *inputs())
    assert shown(graph, kernel) == ["t_kernel Any graph0, Tensor a1!) input0, Tensor input1, str "]
    assert returned(graph, kernel) == [0]
    assert "Tensor(a1!) input0" in str(kernel.operator.gen_schema(fill, *inputs()))


def test_schemas_of_what_is_made_of_an_op() -> None:
    update = define_update()

    def run(out: Tensor, x: Tensor) -> Tensor:
        return update(lambda y: y * x, out * 2, x)

    pure = make_fx(torch.func.functionalize(run))(*inputs())
    assert returned(pure, update) == [2]
    forward, backward = schemas(record(trained(run), *leaves()), update)
    assert len(forward.returns) == 2
    assert len(backward.returns) == 3  # the operands, and the capture
    assert not any(a.alias_info and a.alias_info.is_write for s in (forward, backward) for a in s.arguments)


def test_a_schema_counts_where_inputs_are_declared() -> None:
    @hopkit.define("t_given", inputs=lambda body, x: ((x,),))
    def given(body: Subgraph[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
        first, second = body(x)
        return x, 3, first, second

    graph = record(lambda out, x: given(lambda y: (y + 1, y * x), out), *inputs())
    assert returned(graph, given) == [2]
