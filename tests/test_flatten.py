"""flatten: programs without hopkit, with the values, gradients, names and sizes of those that they were made of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from functorch.compile import aot_module_simplified, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import AutogradError, CallError, DataDependentError, HopkitError, Op, Subgraph, UnknownOpError, flatten
from hopkit.extend import Call, proxy
from tests.fresh import python
from tests.recording import define_once, define_twice, nodes, plainly, record, same, trained

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
W = torch.linspace(0.5, 1.5, 6).reshape(2, 3)


class Plain(torch.fx.Interpreter):
    """A backend that knows no higher-order operators."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") == "higher_order":
            raise NotImplementedError(target)
        return super().call_function(target, args, kwargs)


def define_mix() -> Op[..., Tensor]:
    @hopkit.define("t_mix")
    def mix(left: Subgraph, right: Subgraph, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return scale * torch.nn.functional.linear(left(x), torch.ones(3, 3)) * right(x.sum(0))

    return mix


def exported(model: torch.nn.Module, *inputs: Tensor, sizes: object = None) -> ExportedProgram:
    return torch.export.export(model, inputs, dynamic_shapes=sizes)  # type: ignore[arg-type] # torch's own is wider


class Model(torch.nn.Module):
    """Two ops on the model's own parameters."""

    def __init__(self, twice: Op[..., Tensor], mix: Op[..., Tensor]) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self._twice, self._mix = twice, mix

    def forward(self, x: Tensor) -> Tensor:
        y = self._twice(self.inner, x, scale=0.5)
        return self._mix(torch.sin, lambda z: z * self.inner.bias, y) + x.mean()


@pytest.fixture
def model() -> Model:
    return Model(define_twice(), define_mix())


def operators(module: torch.nn.Module) -> Iterator[object]:
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            yield from (
                n.target for n in inner.graph.nodes if n.op == "call_function" and n.target is not operator.getitem
            )


# Graphs


def test_a_flat_graph_is_what_is_recorded_where_the_ops_vanish() -> None:
    twice, mix = define_twice(), define_mix()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return mix(torch.sin, lambda z: z * w.sum(0), twice(torch.cos, x))

    flat = flatten(record(run, X, W))
    assert list(operators(flat)) == list(operators(plainly(lambda: record(run, X, W))))  # type: ignore[arg-type] # a graph
    same(Plain(flat).run(W, X), run(W, X))


def test_the_original_keeps_its_nodes() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x), X)
    code, children = graph.code, dict(graph.named_modules())
    flat = flatten(graph)
    assert (graph.code, dict(graph.named_modules())) == (code, children)
    assert nodes(graph, twice) == 1
    assert nodes(flat, twice) == 0
    assert list(flat.named_children()) == []


def test_gradients_are_those_of_the_body() -> None:
    twice = define_twice()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: torch.exp(y * w), x)

    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    flat = flatten(record(run, X, W))
    same(trained(flat, second=True)(x, w), plainly(trained(run, second=True), x, w))


def test_a_recorded_derivative_may_be_differentiated_again() -> None:
    twice = define_twice()

    def slope(x: Tensor, w: Tensor) -> Tensor:
        return torch.autograd.grad(twice(lambda y: torch.exp(y * w), x).sum(), x, create_graph=True)[0]

    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    graph = record(slope, x, w)
    assert nodes(graph, twice) == 2
    flat = flatten(graph)
    same(Plain(flat).run(x, w), slope(x, w))
    same(trained(flat)(x, w), plainly(trained(slope), x, w))


def test_ops_in_subgraphs_in_bodies_and_in_branches() -> None:
    twice = define_twice()

    @hopkit.define("t_outer")
    def outer(body: Subgraph, x: Tensor) -> Tensor:
        return twice(body, x) + body(x)

    def run(x: Tensor) -> Any:
        y = outer(lambda y: twice(torch.sin, y), x)
        return torch.cond(y.sum() > 0, lambda y: outer(torch.cos, y), lambda y: y * 2, (y,))

    flat = flatten(make_fx(run, tracing_mode="symbolic")(X))
    assert not any(nodes(flat, op) for op in (twice, outer))
    assert torch.ops.higher_order.cond in operators(flat)
    same(flat(X), plainly(run, X))
    same(flat(-W), plainly(run, -W))


def test_sizes_stay_symbolic() -> None:
    @hopkit.define("t_rows")
    def rows(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) * torch.arange(x.shape[0]).unsqueeze(1) + x.shape[1]

    flat = flatten(record(lambda x: rows(torch.sin, x), X, mode="symbolic"))
    long = torch.ones(5, 4)
    same(flat(long), rows.spec.body(torch.sin, long))


def test_training_graphs_of_a_backend() -> None:
    twice, mix = define_twice(), define_mix()
    left: list[int] = []

    def compiler(graph: GraphModule, inputs: object) -> object:
        flat = flatten(graph)
        left.extend(nodes(flat, op) for op in (twice, mix))
        return make_boxed_func(flat)

    def backend(graph: GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(graph, inputs, compiler)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return mix(torch.sin, lambda z: (z * w.sum(0)).tanh(), twice(lambda y: y * w, x))

    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    same(trained(compiled)(x, w), plainly(trained(run), x, w))
    assert left == [0, 0, 0, 0]


def test_what_dynamo_reads() -> None:
    twice = define_twice()
    flat: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: object) -> GraphModule:
        flat.append(flatten(graph))
        return flat[0]

    x = X.clone().requires_grad_()
    compiled = torch.compile(lambda x: twice(torch.sin, x), backend=backend, fullgraph=True)
    same(trained(compiled)(x), trained(lambda x: x.sin().sin())(x))
    assert nodes(flat[0], twice) == 0
    assert all("example_value" in node.meta for node in flat[0].graph.nodes if node.op == "call_function")


def test_what_a_node_says_of_its_origin_goes_over() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x), X)
    (node,) = graph.graph.find_nodes(op="call_function", target=twice.operator)
    node.meta |= {"nn_module_stack": {"self": ("layer", "Layer")}, "stack_trace": "line 1"}
    new = [n for n in flatten(graph).graph.nodes if n.op == "call_function"]
    assert [n.target for n in new] == [torch.ops.aten.sin.default] * 2 + [torch.ops.aten.mul.Tensor]
    for n in new:
        assert (n.meta["nn_module_stack"], n.meta["stack_trace"]) == ({"self": ("layer", "Layer")}, "line 1")
        assert n.meta["val"].shape == X.shape


def test_a_literal_in_a_body_and_one_in_a_subgraph() -> None:
    @hopkit.define("t_literal")
    def literal(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) + torch.tensor([1.0, 2.0, 3.0])

    def run(x: Tensor) -> Tensor:
        return literal(lambda y: y * torch.tensor([3.0, 2.0, 1.0]), x)

    flat = flatten(record(run, X))
    same(trained(flat)(W.clone().requires_grad_()), trained(run)(W.clone().requires_grad_()))


def test_weights_of_a_graph_that_is_carried_as_it_stands_keep_their_names() -> None:
    @hopkit.define("t_carried", autograd="deferred_error")
    def carried(graph: GraphModule, args: tuple[object, ...]) -> object:
        return graph(*args)

    inner = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 3)))

    graph = record(lambda x: carried(inner, (x,)), X)
    flat = flatten(graph)
    assert {n: p.data_ptr() for n, p in flat.named_parameters()} == {
        n: p.data_ptr() for n, p in graph.named_parameters()
    }
    assert not [m for m in flat.children() if isinstance(m, GraphModule)]
    same(Plain(flat).run(W), inner(W))


def test_nested_arguments_of_a_graph_that_is_carried_as_it_stands() -> None:
    @hopkit.define("t_nested", autograd="deferred_error")
    def nested(graph: GraphModule, args: tuple[object, ...]) -> object:
        return graph(*args)

    @nested.rule("proxy")
    def keep(tracer: proxy.Tracer, call: Call) -> object:
        tracer.register("kept", inner)
        return proxy.node(tracer, call)

    inner = torch.fx.symbolic_trace(lambda pair, more: pair[0] * pair[1] + more["x"])
    graph = record(lambda x, y: nested(inner, ((x, 2), {"x": y})), X, W)
    assert nodes(graph, nested) == 1
    same(Plain(flatten(graph)).run(W, X), W * 2 + X)


def test_a_graph_without_metadata_takes_example_inputs() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x), X, mode="symbolic")
    for node in graph.graph.nodes:
        node.meta.clear()
    with pytest.raises(HopkitError, match="there is no metadata"):
        flatten(graph)
    flat = flatten(graph, X)
    assert nodes(flat, twice) == 0
    same(flat(torch.ones(5, 5)), torch.ones(5, 5).sin().sin())


def test_a_graph_without_ops_is_copied() -> None:
    graph = record(torch.sin, X)
    assert flatten(graph).code == graph.code


# What no graph can say


def detached(body: Subgraph, x: Tensor) -> Tensor:
    return body(x) * x.detach()


def without_gradients(body: Subgraph, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = body(x)
    return y * x


class Through(torch.autograd.Function):
    """Rounds, and passes the gradient through."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


def straight_through(body: Subgraph, x: Tensor) -> Tensor:
    return Through.apply(body(x))  # type: ignore[no-any-return, no-untyped-call] # torch's own


@pytest.mark.parametrize("body", [detached, without_gradients])
def test_a_part_that_has_no_gradient(body: Callable[..., Tensor]) -> None:
    op = hopkit.define("t_partly")(body)
    flat = Plain(flatten(record(lambda x: op(torch.sin, x), X)))
    x, y = (X.clone().requires_grad_() for _ in range(2))
    same(torch.autograd.grad(flat.run(x).sum(), x), torch.autograd.grad(body(torch.sin, y).sum(), y))


def test_gradients_that_a_graph_would_lose() -> None:
    op, body = hopkit.define("t_lossy")(straight_through), straight_through
    with torch.no_grad():
        graph = record(lambda x: op(torch.sin, x), X)
    assert nodes(graph, op) == 1
    with pytest.raises(AutogradError, match="it has a backward of its own"):
        flatten(graph)
    with torch.no_grad():
        same(Plain(flatten(graph)).run(W), body(torch.sin, W))


def test_a_body_that_decides_on_a_value() -> None:
    @hopkit.define("t_branch", inputs=lambda f, x: ((x,),), outputs=lambda f, x: torch.empty_like(x))
    def branch(f: Subgraph, x: Tensor) -> Tensor:
        return f(x) if x.sum() > 0 else x * 2

    graph = record(lambda x: branch(torch.sin, x), X, mode="fake")
    with pytest.raises(DataDependentError, match=r"'t_branch' cannot be flattened.*torch\.cond"):
        flatten(graph)


def test_an_effect_is_not_dropped() -> None:
    @hopkit.define("t_effect", effectful=True)
    def effect(f: Subgraph, x: Tensor) -> Tensor:
        return f(x)

    with pytest.raises(HopkitError, match="'t_effect' has an effect"):
        flatten(record(lambda x: effect(torch.sin, x), X))


def test_what_is_no_graph() -> None:
    with pytest.raises(CallError, match=r"flatten\(\) expected a torch\.fx\.GraphModule or"):
        flatten(torch.nn.ReLU())  # type: ignore[call-overload] # the point


def test_an_op_that_is_gone() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x), X)
    hopkit.undefine(twice)
    with pytest.raises(UnknownOpError, match="'t_twice' of node 't_twice' is not defined"):
        flatten(graph)


# Exported programs


def test_an_exported_program_keeps_its_parameters_and_its_signature(model: Model) -> None:
    program = exported(model, X)
    flat = flatten(program)
    assert not any(nodes(flat.graph_module, op) for op in hopkit.ops().values())
    assert nodes(program.graph_module, model._twice) == 1
    assert flat.dialect == program.dialect
    assert flat.graph_signature.input_specs == program.graph_signature.input_specs
    assert list(flat.state_dict) == ["inner.weight", "inner.bias"]
    same(flat.module()(W), model(W))
    same(
        torch.autograd.grad(flat.module()(W).sum(), list(flat.parameters())),
        plainly(lambda: torch.autograd.grad(model(W).sum(), list(model.parameters()))),
    )


def test_an_exported_program_stays_dynamic(model: Model) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    flat = flatten(exported(model, X, sizes=({0: batch},)))
    many = torch.linspace(-1.0, 1.0, 21).reshape(7, 3)
    same(flat.module()(many), model(many))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:Attempted to insert:UserWarning")  # unflatten's
def test_a_flat_program_has_the_modules_of_the_model() -> None:
    once = define_once()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return once(lambda y: self.linear(y), x)

    model = torch.nn.Sequential(Layer(), Layer())
    program = torch.export.export(model, (X,), preserve_module_call_signature=("0", "1"))
    again = torch.export.unflatten(flatten(program))
    same(again(W), model(W))
    same(dict(again.named_parameters()), dict(model.named_parameters()))


def test_sizes_that_only_running_tells(tmp_path: Path) -> None:
    @hopkit.define("t_found")
    def found(body: Subgraph, x: Tensor) -> Tensor:
        return body(x.nonzero()).sum(1)

    class Found(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = found(lambda i: i + 1, x)
            return y.unsqueeze(1) * torch.arange(y.shape[0])

    flat = flatten(exported(Found(), X))
    torch.export.save(flat, tmp_path / "found.pt2")
    loaded = torch.export.load(tmp_path / "found.pt2")
    for x in (X, torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 3.0]])):
        same(flat.module()(x), Found()(x))
        same(loaded.module()(x), Found()(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of a copy that it makes
def test_a_program_that_torch_made_functional() -> None:
    @hopkit.define("t_in_place")
    def in_place(f: Subgraph, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        return y.add_(f(x)).mul_(torch.tensor([1.0, 2.0, 3.0]))

    class InPlace(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return in_place(torch.sin, x)

    program = exported(InPlace(), X).run_decompositions({})
    flat = flatten(program)
    assert flat.dialect == program.dialect
    same(flat.module()(W), in_place(torch.sin, W))


def test_a_literal_becomes_a_constant_of_the_program() -> None:
    once = define_once()

    class Literal(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return once(lambda y: y * torch.tensor([1.0, 2.0, 3.0]), x)

    flat = flatten(exported(Literal(), X))
    assert [spec.kind.name for spec in flat.graph_signature.input_specs] == ["CONSTANT_TENSOR", "USER_INPUT"]
    same(flat.module()(W), Literal()(W))


def test_a_flat_program_is_loaded_where_nobody_knows_hopkit(model: Model, tmp_path: Path) -> None:
    torch.export.save(flatten(exported(model, X)), tmp_path / "flat.pt2")
    torch.save((W, model(W)), tmp_path / "values.pt")
    program = """
import sys, torch
x, want = torch.load("values.pt")
torch.testing.assert_close(torch.export.load("flat.pt2").module()(x), want)
assert not [name for name in sys.modules if name.startswith("hopkit")]
"""
    done = python("-c", program, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's and onnx's own
def test_a_flat_program_goes_to_onnx(model: Model) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    program = exported(model, X)
    with pytest.raises(Exception, match="t_twice"):
        torch.onnx.export(program, dynamo=True, verbose=False)
    model_proto = torch.onnx.export(flatten(program), dynamo=True, verbose=False).model_proto  # type: ignore[union-attr]
    (got,) = reference.ReferenceEvaluator(model_proto).run(None, {"x": W.numpy()})
    same(torch.from_numpy(got), model(W))


def test_flattened_while_it_is_compiled() -> None:
    """A function that flattens is compiled around the call; where that must not be, the error says what to do."""
    from hopkit._torch.frame import GraphBreak

    once = define_once()
    graph = make_fx(lambda x: once(torch.sin, x))(X)

    def run(x: Tensor) -> Tensor:
        return cast("Tensor", flatten(graph)(x).cos())

    torch.compiler.reset()
    same(torch.compile(run, backend="eager")(X), X.sin().cos())
    torch.compiler.reset()
    with pytest.raises(GraphBreak, match="Flatten before compiling"):
        torch.compile(run, backend="eager", fullgraph=True)(X)
    torch.compiler.reset()
    flat = flatten(graph)
    same(torch.compile(lambda x: flat(x).cos(), backend="eager", fullgraph=True)(X), X.sin().cos())
