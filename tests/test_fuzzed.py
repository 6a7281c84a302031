"""What the fuzzer (tests/fuzz) found, each as small as it could be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from functorch.compile import aot_function, nop  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import hopkit
from hopkit import Subgraph
from hopkit._torch import trees
from hopkit._torch.sizes import Equal, new_environment
from tests.modes import Boxed, Looking, Passing
from tests.recording import define_once, define_twice, nodes, record, same

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's own decompositions
]

X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
T = torch.linspace(0.5, 1.5, 3)

Called = Callable[[Tensor], Any]


def slope(x: Tensor) -> Tensor:
    return cast("Tensor", torch.func.grad(lambda y: (y.sin() * y).sum())(x))


def pushed(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """A rule for tangents of an op that calls its one subgraph."""
    return torch.func.jvp(primals[0], primals[1:], tangents[1:])


@pytest.mark.parametrize("inside", [slope, torch.vmap(torch.sin)])
def test_a_subgraph_transforms_what_it_closes_over(inside: Callable[[Tensor], Tensor]) -> None:
    op = define_once()
    with pytest.warns(hopkit.HopkitWarning, match="applies a transform of torch.func to what it closes over"):
        graph = record(lambda x, t: op(lambda y: y * inside(t), x), X, T)
    same(graph(X + 1, T * 2), (X + 1) * inside(T * 2))


def test_a_subgraph_transforms_what_it_is_given() -> None:
    op = define_once()
    graph = record(lambda x: op(slope, x), T)
    assert nodes(graph, op) == 1
    same(graph(T * 2), slope(T * 2))


def _forward(f: Called) -> object:
    return torch.func.jvp(f, (T,), (T,))


def _reverse(f: Called) -> object:
    _, pull, *_ = torch.func.vjp(f, T)
    return cast("Called", pull)(T)


def _mapped(f: Called) -> object:
    return torch.vmap(f)(X)


def _functional(f: Called) -> object:
    return torch.func.functionalize(f)(T)


@pytest.mark.parametrize("transform", [_forward, _reverse, _mapped, _functional])
def test_flatten_under_a_transform(transform: Callable[[Called], object]) -> None:
    op = define_once()

    def flat(x: Tensor) -> Any:
        return hopkit.flatten(record(lambda y: op(torch.sin, y), x))(x)

    same(transform(flat), transform(torch.sin))


def test_a_recorded_derivative_under_functionalize() -> None:
    op = define_once()
    slope: Called = torch.func.grad(lambda x: op(torch.sin, x).sum())
    graph = record(slope, T)
    assert nodes(graph, op) > 0
    same(torch.func.functionalize(graph)(T), T.cos())


def test_a_recorded_derivative_requires_a_gradient_where_the_body_does() -> None:
    op = define_once()
    unused = T.clone().requires_grad_()

    def slopes(x: Tensor, unused: Tensor) -> Tensor:
        return cast("Tensor", torch.func.grad(lambda y: op(lambda y, _: y.sin(), y, unused).sum())(x))

    graph = record(slopes, T, unused)
    assert not graph(T, unused).requires_grad
    assert graph(T.clone().requires_grad_(), unused).requires_grad


def test_a_derivative_is_recorded_twice_and_differentiated() -> None:
    # What autograd saves of tanh was taken for a detached part, and the second recording lost the derivative.
    op = define_once()
    leaf = T.clone().requires_grad_()
    slope: Called = torch.func.grad(lambda x: op(torch.tanh, x).sum())
    once = make_fx(slope)(leaf)
    twice = make_fx(once)(leaf)
    assert nodes(twice, op) == nodes(once, op) == 2
    wanted = torch.autograd.grad(torch.func.grad(lambda x: x.tanh().sum())(leaf).sum(), leaf)
    same(torch.autograd.grad(twice(leaf).sum(), leaf), wanted)


def test_outputs_that_depend_on_nothing_that_requires_a_gradient() -> None:
    @hopkit.define("t_parts")
    def parts(body: Subgraph, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return body(x), y + 1

    leaf = T.clone().requires_grad_()
    with Passing(whole=True):
        first, second = parts(torch.sin, leaf, T)
    assert first.requires_grad
    assert not second.requires_grad


def test_jvp_of_an_output_that_is_expanded() -> None:
    op = define_once()

    def run(x: Tensor) -> object:
        return torch.func.jvp(lambda x: op(lambda x, y: (x * y).sum(0).expand(4, 3), x, X), (x,), (x * 2,))

    (value, tangent), plain = record(run, T)(T), (T * X).sum(0).expand(4, 3)
    same((value, tangent), (plain, 2 * plain))


def test_jacfwd_of_a_recorded_batch_that_does_not_depend_on_it() -> None:
    op = define_once()

    def run(x: Tensor) -> Tensor:
        graph = record(lambda x: torch.vmap(lambda y: op(lambda y, t: y * 0 + t.sin(), y, T))(x), x)
        return cast("Tensor", graph(x))

    same(torch.func.jacfwd(run)(X), torch.zeros(2, 3, 2, 3))


class Tenfold(torch.autograd.Function):
    """With a derivative that is not its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 10

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[object, ...], output: object) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7

    @staticmethod
    def vmap(info: object, in_dims: tuple[int | None, ...], x: Tensor) -> tuple[Tensor, int | None]:
        return x * 10, in_dims[0]

    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:
        return tangent * 7


def tenfold(x: Tensor) -> Tensor:
    return cast("Tensor", Tenfold.apply(x))  # type: ignore[no-untyped-call] # torch's own


def test_export_of_a_derivative_that_is_written_by_hand_in_a_subgraph() -> None:
    # Export records before autograd: what was differentiated was the recorded graph, and the derivative was 10.
    op = define_once()

    class Slope(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(op(tenfold, leaf).sum(), leaf)[0]

    with pytest.raises(hopkit.AutogradError, match="cannot be differentiated inside an exported program: it has"):
        torch.export.export(Slope(), (T,), strict=False)


def test_a_derivative_that_is_written_by_hand_is_no_reason_for_none_in_an_exported_program() -> None:
    # Where torch runs the forward of an autograd.Function gradients are off, and yet what comes out has one.
    op = define_once()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(tenfold, x)

    leaf = T.clone().requires_grad_()
    program = torch.export.export(Model(), (leaf,), strict=False)
    assert program.module()(leaf).requires_grad


@pytest.mark.parametrize("strict", [False, True])
def test_an_op_under_no_grad_in_an_exported_model(strict: bool) -> None:
    op = define_once()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                fixed = op(lambda y: y * 2, x)
            return x + fixed

    program = torch.export.export(Model(), (T,), strict=strict)
    leaf = T.clone().requires_grad_()
    found = program.module()(leaf)
    same(found, T * 3)
    same(torch.autograd.grad(found.sum(), leaf), (torch.ones(3),))


def test_an_exported_subgraph_applies_a_transform() -> None:
    op = define_once()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(torch.vmap(torch.sin), x)

    program = torch.export.export(Model(), (X,), strict=False)
    same(program.module()(X), X.sin())


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_subgraph_that_differentiates_with_torch_func(strict: bool) -> None:
    op = define_once()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(slope, x)

    with pytest.raises(hopkit.SubgraphError, match=r"'t_once' differentiates with torch\.func.*torch\.autograd\.grad"):
        torch.export.export(Model(), (T,), strict=strict)


def test_an_exported_subgraph_that_differentiates_otherwise() -> None:
    op = define_once()

    def inside(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad((leaf.sin() * leaf).sum(), leaf)[0]

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(inside, x)

    same(torch.export.export(Model(), (T,), strict=False).module()(T * 2), slope(T * 2))


def test_an_op_that_gives_no_tensor_in_a_batch() -> None:
    @hopkit.define("t_none")
    def none(body: Subgraph, x: Tensor) -> None:
        body(x)

    def run(x: Tensor) -> Tensor:
        none(torch.sin, x)
        return x * 2

    graph = record(torch.vmap(run), X)
    same(graph(X), X * 2)


def test_a_derivative_that_is_recorded_inside_a_mode_may_be_differentiated() -> None:
    # Its result and what it depends on were detached: whoever ran the graph lost a gradient without a word.
    op = define_once()
    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()

    def slope(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def sloped(x: Tensor) -> Tensor:
            _, pull, *_ = torch.func.vjp(lambda x: run(lambda y: (y * weight).sin(), x), x)
            return cast("Tensor", pull(torch.ones(3))[0])

        return sloped

    with Passing():
        graph = make_fx(slope(op))(T)
    leaf = T.clone().requires_grad_()
    want = slope(lambda f, x: f(x))(leaf)
    same(graph(leaf), want)
    same(torch.autograd.grad(graph(leaf).sum(), [leaf, weight]), torch.autograd.grad(want.sum(), [leaf, weight]))


def test_no_grad_inside_a_transform_holds_around_it_too() -> None:
    op, weight = define_once(), T.clone().requires_grad_()

    def without(f: Called) -> Called:
        def run(x: Tensor) -> object:
            with torch.no_grad():
                return make_fx(f)(x)(x)

        return run

    for f in (lambda y: y * weight, lambda x: op(lambda y: y * weight, x)):
        value, *_ = torch.func.vjp(without(f), T)
        assert not value.requires_grad


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum()))])
def test_a_batched_subgraph_reads_dynamic_sizes(transform: Callable[[Called], Called]) -> None:
    op = define_once()
    run = transform(lambda x: op(lambda y: y.sin() / (y.numel() + y.shape[0] + y.stride(0) + y.storage_offset()), x))
    for recorded in (run, torch.func.functionalize(run)):
        graph = make_fx(recorded, tracing_mode="symbolic")(X)
        assert nodes(graph, op)
        for x in (X, torch.cat([X, X], 1), torch.cat([X, X], 1).requires_grad_()):
            same(graph(x), run(x))


@pytest.mark.parametrize("transform", [torch.func.jacfwd, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_a_recorded_jvp_of_a_derivative_of_its_own(transform: Callable[[Called], Called]) -> None:
    op = define_once()
    run = transform(lambda x: op(tenfold, x).sin())
    graph = make_fx(run)(T)
    assert nodes(graph, op) == 0
    same(graph(T * 2), transform(lambda x: tenfold(x).sin())(T * 2))


@pytest.mark.parametrize("transform", [_forward, _reverse, _mapped, _functional])
def test_a_transform_of_a_subclass_is_recorded(transform: Callable[[Called], object]) -> None:
    op = define_once()

    def run(x: Tensor) -> object:
        result = transform(lambda y: op(torch.sin, Boxed(x) * y))
        return trees.map_only(Boxed, lambda t: t.held, result)

    graph = record(run, T.clone())
    same(graph(T * 2), run(T * 2))


def test_nobody_records_that_an_op_asks_for_dual_numbers() -> None:
    op, fixed = define_once(), T.clone()
    with forward_ad.dual_level():
        graph = make_fx(lambda x: op(lambda y: (y * 2, fixed), x)[0], tracing_mode="fake")(T)
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default)
    same(graph(T + 1), (T + 1) * 2)


def test_a_compiled_op_within_an_op_inside_vmap() -> None:
    op, inner = define_once(), define_twice()
    compiled = torch.compile(
        lambda x: op(lambda y: inner(lambda z: z.sin() * y, y), x), backend="eager", fullgraph=True
    )
    same(torch.vmap(lambda x: compiled(x))(X), X.sin().mul(X).sin() * X)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [slope, torch.vmap(torch.sin)])
def test_a_compiled_subgraph_transforms_what_it_closes_over(inside: Called, backend: str) -> None:
    # The graph that Dynamo had read entered a transform, met the reason to decompose, and never left it.
    op, fixed = define_once(), T.clone()
    compiled = torch.compile(lambda x: op(lambda y: y * inside(fixed), x), backend=backend, fullgraph=True)
    with pytest.warns(hopkit.HopkitWarning, match="applies a transform of torch.func to what it closes over"):
        same(compiled(X), X * inside(fixed))


@pytest.mark.filterwarnings("ignore:A model attribute")  # torch's own word on the constant
def test_export_inside_a_derivative() -> None:
    op, fixed = define_once(), T.double().requires_grad_()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(lambda y: y * x * fixed, x)

    def slope_of(f: Called) -> Tensor:
        return cast("Tensor", torch.func.grad(lambda x: f(x).sum())(T))

    same(slope_of(lambda x: torch.export.export(Model(), (x,), strict=False).module()(x)), slope_of(Model()))


def test_nobody_records_that_sizes_are_compared() -> None:
    compared: list[str] = []

    def run(x: Tensor) -> Tensor:
        unknown: Any = new_environment().create_unbacked_symint()  # no tracer follows it
        compared.extend(str(equal.holds(3, unknown)) for equal in (Equal.ALWAYS, Equal.NOW, Equal.PERHAPS))
        return x

    make_fx(run)(T)
    assert compared == ["False", "False", "True"]


def test_dual_numbers_inside_a_recorded_derivative() -> None:
    op = define_once()

    def slope_of_tangent(f: Called) -> Called:
        def tangent(x: Tensor) -> Tensor:
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.detach()))).tangent
                return cast("Tensor", found).sum()

        return cast("Called", torch.func.grad(tangent))

    graph = record(slope_of_tangent(lambda x: op(torch.sin, x)), T)
    same(graph(T * 2), slope_of_tangent(torch.sin)(T * 2))


def test_items_lie_otherwise_in_memory_than_the_one_that_was_traced() -> None:
    def body(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, y.tanh()).reshape(-1)

    op, xs = define_once(), torch.linspace(-1.0, 1.0, 24).reshape(2, 4, 3)
    for dim in range(3):
        got = torch.vmap(lambda x: record(lambda y: op(body, y), x)(x), in_dims=dim)(xs)
        same(got, torch.vmap(body, in_dims=dim)(xs))


@pytest.mark.parametrize(
    "function",
    [
        lambda y: (y / y.max()).sin().sum(),
        lambda y: (y.clamp(-0.5, 0.5) * y.exp()).sum(),
        lambda y: (y.softmax(0) ** 2).sum(),
    ],
)
def test_tangents_of_zero_that_are_viewed(function: Called) -> None:
    op = define_once()

    def curvature(f: Called) -> Called:
        return torch.vmap(torch.func.hessian(f))

    graph = record(curvature(lambda x: op(function, x)), X)
    assert nodes(graph, op)
    same(graph(X * 2), curvature(function)(X * 2))


@pytest.mark.parametrize("times", [1, 2])
def test_a_derivative_is_traced_before_dispatch_in_its_nodes_place(times: int) -> None:
    op = define_twice()

    def slope(f: Called) -> Called:
        def run(x: Tensor) -> Tensor:
            (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=times == 2)
            return first if times == 1 else torch.autograd.grad(first.sin().sum(), x)[0]

        return run

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return cast("Tensor", graph(x))

    graph = record(slope(lambda x: op(torch.sin, x)), T.clone().requires_grad_())
    want = slope(lambda x: x.sin().sin())((T * 2).requires_grad_())
    same(torch.export.export(Model(), (T,), strict=False).module()(T * 2), want)
    with hopkit.decompose(op):
        again = make_fx(graph, pre_dispatch=True)(T)
    assert nodes(again, op) == 0
    same(again(T * 2), want)


def test_a_tensor_subclass_in_a_compiled_derivative() -> None:
    op = define_once()

    def pulled(f: Called) -> Called:
        def run(x: Tensor) -> Tensor:
            value, pull, *_ = torch.func.vjp(lambda x: f(Boxed(x)).held, x)
            return cast("Tensor", value + cast("Called", pull)(x)[0])

        return run

    compiled = torch.compile(pulled(lambda x: op(lambda y: y, x)), backend="aot_eager")
    same(compiled(T), pulled(lambda x: x)(T))


def test_dual_numbers_without_gradients_inside_a_derivative() -> None:
    op = define_once()

    def pulled(f: Called) -> Called:
        def tangent(x: Tensor) -> Tensor:
            with forward_ad.dual_level(), torch.no_grad():
                return cast("Tensor", forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.detach()))).tangent)

        return lambda x: torch.func.vjp(lambda x: record(tangent, x)(x) * x, x)[1](x)[0]

    same(pulled(lambda x: op(torch.sin, x))(T), pulled(torch.sin)(T))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:Attempted to insert a get_attr")  # torch's own
def test_a_second_derivative_in_a_checkpoint_that_is_linearized() -> None:
    op = define_once()

    def curved(f: Called) -> Called:
        def run(x: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            (first,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
            return torch.autograd.grad(first.sin().sum(), leaf)[0]

        return run

    def moved(f: Called) -> Tensor:
        value, push = torch.func.linearize(lambda x: checkpoint(curved(f), x, use_reentrant=False) + x, T)
        return cast("Tensor", value + push(T))

    same(moved(lambda x: op(torch.sin, x)), moved(torch.sin))


def test_a_tangent_in_inference_mode_is_recorded() -> None:
    op = define_once()
    with torch.inference_mode():
        _, tangent, *_ = torch.func.jvp(lambda x: record(lambda y: op(torch.sin, y), x)(x), (T,), (T + 1,))
    same(tangent, T.cos() * (T + 1))


def test_what_differentiates_is_recorded_in_inference_mode() -> None:
    op = define_once()

    def chosen(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, torch.func.grad(lambda z: z.sin().sum())(y))

    with torch.inference_mode():
        graph = record(lambda x: op(chosen, x), T.clone().requires_grad_())
        same(graph(T), chosen(T))


def test_inference_mode_inside_a_tangent_is_recorded() -> None:
    op = define_once()

    def in_inference_mode(f: Called) -> Called:
        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return cast("Tensor", record(f, x)(x))

        return run

    def tangent(f: Called) -> Tensor:
        return cast("Tensor", torch.func.jvp(in_inference_mode(f), (T + 1,), (T,))[1])

    same(tangent(lambda x: op(lambda y: y, x)), tangent(lambda x: x))


def test_a_functionalized_tangent_of_another_layout_in_a_tangent() -> None:
    op = define_once()

    def moved(f: Called) -> Called:
        def tangent(x: Tensor) -> Tensor:
            return cast("Tensor", torch.func.jvp(f, (x,), (x.sin(),))[1])

        functional = torch.func.functionalize(tangent, remove="mutations_and_views")
        return lambda x: torch.func.jvp(functional, (x,), (x,))[1]

    def turned(y: Tensor) -> Tensor:
        return y.t() * y.sum()

    same(record(moved(lambda x: op(turned, x)), X)(X + 1), moved(turned)(X + 1))


def test_a_mode_that_takes_ops_whole_sees_a_subclass_in_inference_mode() -> None:
    op, boxed = define_once(), cast("Any", Boxed)(T)
    with Passing(True), torch.inference_mode():
        result: Any = op(torch.sin, boxed)
    same(result.held, T.sin())


def test_an_op_with_a_rule_for_tangents_is_functionalized() -> None:
    op = define_once()
    op.rule("jvp")(pushed)

    same(torch.func.functionalize(lambda x: op(torch.sin, x), remove="mutations_and_views")(T), T.sin())
    with forward_ad.dual_level():
        x = forward_ad.make_dual(T, T + 1)
        result = torch.func.functionalize(lambda x: op(torch.sin, x), remove="mutations_and_views")(x)
        same(forward_ad.unpack_dual(result).tangent, T.cos() * (T + 1))


def test_a_rule_for_tangents_is_not_asked_where_there_is_none() -> None:
    op = define_once()
    op.rule("jvp")(pushed)

    def inside(t: Tensor) -> Tensor:
        return cast("Tensor", record(lambda x: op(torch.sin, x), X)(X)) * t

    same(torch.func.jvp(inside, (T,), (T,)), (X.sin() * T, X.sin() * T))


def test_a_rule_for_tangents_gets_a_subgraph_that_closes_over_a_constant() -> None:
    op = define_once()
    op.rule("jvp")(pushed)

    def scaled(x: Tensor) -> Tensor:
        return op(lambda y: y * T, x)

    same(torch.func.jacfwd(torch.vmap(scaled))(X), torch.func.jacfwd(lambda x: x * T)(X))


def test_a_node_that_gives_nothing_but_operands_with_rules() -> None:
    op = define_once()
    op.rule("jvp")(pushed)

    @op.rule("vmap")
    def batched(batch: object, in_dims: Any, body: object, *xs: Tensor) -> Any:
        return xs[0], in_dims[1]

    graph = record(lambda x: op(lambda y: y, x), T)
    with forward_ad.dual_level():
        same(forward_ad.unpack_dual(graph(forward_ad.make_dual(T, T + 1))).tangent, T + 1)
    same(torch.vmap(graph)(X), X)


def test_a_subclass_of_what_asks_for_a_gradient_ahead_of_time() -> None:
    op = define_once()
    op.rule("device")(lambda body, *xs: body(*xs))
    boxed = cast("Any", Boxed)(T.clone().requires_grad_())
    result = aot_function(lambda x: op(torch.sin, x), fw_compiler=nop)(boxed)
    (slope,) = torch.autograd.grad(result.sum(), boxed)
    same((result.held, slope.held), (T.sin(), T.cos()))


def test_a_tensor_that_outlived_its_transform() -> None:
    op, kept = define_once(), list[Tensor]()
    op.rule("device")(lambda body, *xs: body(*xs))

    def keeping(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sin().sum()

    torch.func.jvp(torch.func.grad(keeping), (T,), (T,))
    same(op(torch.sin, kept[0]), T.sin())


def test_the_tangent_of_a_part_of_a_tensor_ahead_of_time() -> None:
    once, twice = define_once(), define_twice()

    def tangent(f: Called) -> Called:
        return lambda x: torch.func.jvp(f, (x,), (x.cos(),))

    def nested(x: Tensor) -> Tensor:
        return once(lambda y: twice(lambda z: torch.sin(z) * y, y), x)

    def plain(x: Tensor) -> Tensor:
        return torch.sin(torch.sin(x) * x) * x

    part = X.flatten()[:3]
    same(aot_function(tangent(nested), fw_compiler=nop)(part), list(tangent(plain)(part)))


def test_what_dynamo_reads_in_place_under_a_torch_function_mode() -> None:
    op = define_once()

    def run(x: Tensor) -> Tensor:
        with Looking():
            return cast("Tensor", torch.func.grad(lambda y: op(torch.vmap(torch.sin), y).sum())(x))

    with pytest.warns(hopkit.HopkitWarning, match="is not kept in the graph"):
        result = torch.compile(run, fullgraph=True, backend="eager")(X)
    same(result, X.cos())


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of copies of views in a batch
def test_what_is_detached_is_recorded_without_views() -> None:
    op, scale = define_once(), T.clone().requires_grad_()

    def run(x: Tensor) -> Tensor:
        without = torch.func.functionalize(
            lambda x: op(lambda y: (y * scale).detach() * y * scale, x), remove="mutations_and_views"
        )
        return cast("Tensor", without(x))

    found, expected = torch.vmap(lambda x: make_fx(run)(x)(x))(X), (X * scale).detach() * X * scale
    same(found.detach(), expected.detach())
    same(torch.autograd.grad(found.sum(), scale), torch.autograd.grad(expected.sum(), scale))


def test_zeros_without_memory_are_not_those_of_torchs_cache() -> None:
    op, times = define_once(), 3

    def tangents(f: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            values, moved, *_ = torch.func.jvp(f, (x,), (x.cos(),))
            return (*values, *moved)

        return run

    def called(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(op(lambda y: torch.stack([y * 2] * times), x) for _ in range(times))

    def plain(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack([x * 2] * times),) * times

    flat = hopkit.flatten(record(tangents(tangents(called)), T))
    same(flat(T * 2), tangents(tangents(plain))(T * 2))


def test_a_jvp_rule_beside_a_constant_that_is_no_stand_in() -> None:
    @hopkit.define("t_first")
    def first(f: Subgraph[Any], x: Tensor) -> Tensor:
        return cast("Tensor", f(x)[0])

    @first.rule("jvp")
    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return torch.func.jvp(lambda x: primals[0](x)[0], primals[1:], tangents[1:])

    constant = torch.full((3,), 2.0)

    def run(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad(), forward_ad.dual_level():
            primal, tangent = forward_ad.unpack_dual(first(lambda y: (y.sin(), constant), forward_ad.make_dual(x, t)))
            return primal, tangent

    graph = make_fx(run, tracing_mode="fake")(T, X[1])
    same(graph(T * 2, X[0]), ((T * 2).sin(), (T * 2).cos() * X[0]))


def test_a_backward_that_transforms_in_a_checkpoint_around_aot_autograd() -> None:
    op, x = define_once(), T.clone().requires_grad_()

    @op.rule("autograd")
    class Rule:
        @staticmethod
        def forward(body: Subgraph, *xs: Tensor) -> tuple[Tensor, object]:
            return body(*xs), (body, xs)

        @staticmethod
        def backward(saved: Any, gradient: Tensor) -> tuple[Tensor]:
            body, xs = saved
            _, pull, *_ = torch.func.vjp(body, *xs)
            return cast("tuple[Tensor]", cast("Called", pull)(gradient))

    def ahead(x: Tensor) -> Tensor:
        (result,) = aot_function(lambda x: (op(torch.sin, x),), fw_compiler=nop)(x)
        return cast("Tensor", result)

    result = checkpoint(ahead, x, use_reentrant=False)
    same(torch.autograd.grad(cast("Tensor", result).sum(), x), (T.cos(),))


def test_a_jvp_rule_of_a_number_has_the_dtype_of_its_result() -> None:
    op = define_once()
    op.rule("jvp")(pushed)
    x = torch.tensor(0.5)
    (found,) = torch.autograd.functional.jvp(lambda x: op(lambda y: y * 0.7, x), x, x)[1:]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(op(lambda y: y * 0.7, forward_ad.make_dual(x, x))).tangent
    same((found, tangent), (x * 0.7, x * 0.7))
