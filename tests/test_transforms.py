"""torch.func's transforms: right in any nesting; recorded, a node of the op under its transform, subgraphs and all."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx import GraphModule

import hopkit
from hopkit import HopkitError, Op, OpSpec, Subgraph
from hopkit._torch import trees
from hopkit.errors import PluginError
from hopkit.extend import Call
from hopkit.extend.autograd import every_level
from hopkit.extend.jvp import Tangents
from hopkit.extend.vmap import Batch, on_call
from hopkit.layout import loads
from tests.recording import Function, nodes, plainly, record, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's, where it loads forward mode
]

X = torch.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
V = torch.linspace(0.2, 0.9, 8).reshape(2, 4)
W = torch.linspace(0.5, 1.5, 4)

Reduced = Op[[Subgraph, Tensor], Tensor]


def define_reduced() -> Reduced:
    """An op that a batched subgraph alone would get wrong: its body reduces over an axis."""

    @hopkit.define("t_reduced")
    def reduced(body: Subgraph, x: Tensor) -> Tensor:
        return body(x).sum(0) * x.mean()

    return reduced


def steps(graph: torch.nn.Module, op: Op[..., Any]) -> list[list[str]]:
    """Per node of the op, the names of its transforms."""
    modules = [module for module in graph.modules() if isinstance(module, GraphModule)]
    found = [n for m in modules for n in m.graph.find_nodes(op="call_function", target=op.operator)]
    return [[str(step[0]) for step in loads(n.kwargs["hopkit"]).transforms] for n in found]


pull: Any = vjp  # typed for functions of one result
push: Any = jvp


def sum_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).sum()


Build = Callable[[Callable[..., Tensor]], Function]

NESTINGS: dict[str, tuple[Build, list[list[str]]]] = {
    "vmap": (lambda f: lambda x, w: vmap(lambda r: f(r, w))(x), [["vmap"]]),
    "vmap of a capture": (lambda f: lambda x, w: vmap(f)(x, w.expand(2, 4) * 2), [["vmap"]]),
    "in_dims": (lambda f: lambda x, w: vmap(lambda r: f(r, w), in_dims=2)(x.permute(1, 2, 0)), [["vmap"]]),
    "vmap vmap": (lambda f: lambda x, w: vmap(vmap(lambda r: f(r, w.sum())))(x), [["vmap", "vmap"]]),
    "jvp": (lambda f: lambda x, w: jvp(lambda x: f(x, w), (x[0],), (x[1],)), [["jvp"]]),
    "jvp of a capture": (lambda f: lambda x, w: jvp(lambda w: f(x[0], w), (w,), (w + 1,)), [["jvp"]]),
    "grad": (lambda f: lambda x, w: grad(lambda x: f(x, w).sum())(x[0]), [[], ["vjp"]]),
    "grad of a capture": (lambda f: lambda x, w: grad(lambda w: f(x[0], w).sum())(w), [[], ["vjp"]]),
    "grad grad": (
        lambda f: lambda x, w: grad(sum_of(grad(lambda x: f(x, w).sum())))(x[0]),
        [[], ["vjp"], ["vjp", "vjp"]],
    ),
    "vmap grad": (
        lambda f: lambda x, w: vmap(grad(lambda x: f(x, w).sum()))(x),
        [["vmap"], ["vjp", "vmap"]],
    ),
    "grad vmap": (
        lambda f: lambda x, w: grad(lambda x: vmap(lambda x: f(x, w))(x).sum())(x),
        [["vmap"], ["vmap", "vjp"]],
    ),
    "jvp vmap": (lambda f: lambda x, w: push(vmap(lambda x: f(x, w)), (x,), (x + 1,)), [["vmap", "jvp"]]),
    "jvp grad": (
        lambda f: lambda x, w: push(grad(lambda x: f(x, w).sum()), (x[0],), (x[1],)),
        [["jvp"], ["vjp", "jvp"]],
    ),
    "grad jvp": (
        lambda f: lambda x, w: grad(lambda x: push(lambda x: f(x, w), (x,), (x + 1,))[1].sum())(x[0]),
        [["jvp"], ["jvp", "vjp"]],
    ),
    "vjp": (lambda f: lambda x, w: pull(lambda x: f(x, w), x[0])[1](w), [[], ["vjp"]]),
    "jacrev": (lambda f: lambda x, w: jacrev(lambda x: f(x, w))(x[0]), [[], ["vjp", "vmap"]]),
    "jacfwd": (lambda f: lambda x, w: jacfwd(lambda x: f(x, w))(x[0]), [["jvp", "vmap"]]),
    "hessian": (
        lambda f: lambda x, w: hessian(lambda x: f(x, w).sum())(x[0]),
        [["jvp", "vmap"], ["vjp", "vmap", "jvp", "vmap"]],
    ),
}
"""What is done to ``f(x, w)``, which gives a vector; and the nodes of the op that are left, with their transforms."""


def once_in(op: Reduced, build: Build) -> Function:
    return build(lambda x, w: op(lambda y: y.sin() * w, x))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_eager(nesting: str) -> None:
    function = once_in(define_reduced(), NESTINGS[nesting][0])
    same(function(X, W), plainly(function, X, W))


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_recorded(nesting: str, mode: Any) -> None:
    if mode == "symbolic" and nesting in ("jvp", "jvp grad", "grad jvp"):
        pytest.skip("torch makes no dual of tensors with symbolic sizes, whatever is done with it")
    op, (build, wanted) = define_reduced(), NESTINGS[nesting]
    function = once_in(op, build)
    graph = record(function, X, W, mode=mode)
    assert steps(graph, op) == wanted
    for x, w in ((X, W), (X.cos(), W - 2)):
        same(graph(x, w), plainly(function, x, w))
    same(record(graph, X, W)(X + 1, W), plainly(function, X + 1, W))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_compiled(nesting: str) -> None:
    op, (build, _) = define_reduced(), NESTINGS[nesting]
    function, graphs = once_in(op, build), list[GraphModule]()
    torch.compiler.reset()

    def keep(graph: GraphModule, _: object) -> Function:
        graphs.append(graph)
        return graph.forward

    same(torch.compile(function, backend=keep, fullgraph=True)(X, W), plainly(function, X, W))
    assert nodes(graphs[0], op) == 1
    torch.compiler.reset()
    ahead = torch.compile(function, backend="aot_eager", fullgraph=True)
    for x, w in ((X, W), (X.cos(), W - 2)):
        same(ahead(x, w), plainly(function, x, w))


@pytest.mark.parametrize("nesting", ["vmap", "vmap of a capture", "jvp", "vmap vmap"])
def test_a_transformed_node_is_differentiated(nesting: str) -> None:
    op, (build, _) = define_reduced(), NESTINGS[nesting]
    function = once_in(op, build)
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    step = trained(
        lambda x, w: sum(t.sum() for t in trees.leaves(function(x, w)) if isinstance(t, Tensor)), second=True
    )
    graph = record(step, x, w)
    assert ["vjp"] in [names[-1:] for names in steps(graph, op)]
    same(graph(x, w), plainly(step, x, w))


def test_a_composite_under_vmap() -> None:
    @hopkit.define("t_scan")
    def scan(step: Subgraph[tuple[Tensor, Tensor]], carry: Tensor, xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = []
        for x in xs.unbind(0):
            carry, output = step(carry, x)
            outputs.append(output)
        return carry, {"outputs": torch.stack(outputs)}

    def function(xs: Tensor, v: Tensor) -> object:
        return vmap(lambda xs, v: scan(lambda h, x: (torch.tanh(h + x * v), h * x), v, xs), out_dims=1)(xs, v)

    graph = record(function, X, V)
    assert steps(graph, scan) == [["vmap"]]
    same(graph(X + 1, V), plainly(function, X + 1, V))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_numbers_in_a_batch(randomness: Any) -> None:
    reduced = define_reduced()
    function = vmap(lambda x: reduced(lambda y: y * torch.rand_like(y), x), randomness=randomness)
    graph = record(function, X)
    assert steps(graph, reduced) == [["vmap"]]
    results = []
    for run in (function, graph):
        torch.manual_seed(0)
        results.append(run(X))
    same(*results)


def test_chunks_and_linearize_and_functional_call() -> None:
    reduced, linear = define_reduced(), torch.nn.Linear(4, 4)
    chunked = vmap(lambda x: reduced(torch.sin, x), chunk_size=1)
    same(chunked(X), plainly(chunked, X))
    assert len(steps(record(chunked, X), reduced)) == 2

    def tangents(x: Tensor) -> object:
        value, push = linearize(lambda x: reduced(torch.sin, x), x)
        return value, push(torch.ones_like(x))

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Attempted to insert a get_attr Node", UserWarning
        )  # torch's, of any submodule
        same(tangents(X[0]), plainly(tangents, X[0]))

    def called(weight: Tensor) -> object:
        parameters = {"weight": weight, "bias": linear.bias.detach()}
        return reduced(lambda y: torch.func.functional_call(linear, parameters, (y,)), X[0]).sum()

    same(grad(called)(linear.weight.detach()), plainly(grad(called), linear.weight.detach()))


# -- ops that decide on values ---------------------------------------------------------------------------------------


def define_branch() -> Op[..., Tensor]:
    @hopkit.define(
        "t_branch", inputs=lambda use, yes, no, x: ((x,), (x,)), outputs=lambda use, yes, no, x: torch.empty_like(x)
    )
    def branch(use: Tensor, yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
        if hopkit.batched(use):
            return torch.where(use > 0, yes(x), no(x))
        return yes(x) if use > 0 else no(x)

    return branch


BRANCHES: dict[str, Callable[[Callable[..., Any]], Function]] = {
    "vmap": lambda f: lambda use, x: vmap(lambda x: f(use, x))(x),
    "jvp": lambda f: lambda use, x: push(lambda x: f(use, x), (x,), (x + 1,)),
    "grad": lambda f: lambda use, x: grad(lambda x: f(use, x).sum())(x),
    "vmap of grad": lambda f: lambda use, x: vmap(grad(lambda x: f(use, x).sum()))(x),
    "grad of vmap": lambda f: lambda use, x: grad(lambda x: vmap(lambda x: f(use, x))(x).sin().sum())(x),
    "jacrev": lambda f: lambda use, x: jacrev(lambda x: f(use, x))(x[0]),
    "jacfwd": lambda f: lambda use, x: jacfwd(lambda x: f(use, x))(x[0]),
    "hessian": lambda f: lambda use, x: hessian(lambda x: f(use, x).sum())(x[0]),
}


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("how", [record, partial(torch.compile, backend="aot_eager", fullgraph=True)])
def test_an_op_that_decides_on_values_is_one_node(how: Callable[..., Function], name: str) -> None:
    branch = define_branch()
    of, yes = BRANCHES[name], torch.tensor(1.0)
    run = of(lambda use, x: branch(use, lambda y: y.sin() * W, lambda y: y**3, x))
    recorded = record(run, yes, X[0]) if how is record else how(run)
    assert not isinstance(recorded, GraphModule) or nodes(recorded, branch) > 0
    for use in (yes, -yes):
        same(recorded(use, X[0] * 2), of(lambda use, x: x.sin() * W if use > 0 else x**3)(use, X[0] * 2))
    rows = {row.mode: row.kind for row in hopkit.explain(branch).rows}
    assert {rows["vmap"], rows["jvp"], rows["grad"]} == {"derived"}


def test_a_decision_for_every_item_of_a_batch() -> None:
    branch, each = define_branch(), torch.tensor([1.0, -1.0])

    def run(use: Tensor, x: Tensor) -> object:
        return vmap(grad(lambda x, use: branch(use, lambda y: y.sin() * W, lambda y: y**3, x).sum()))(x, use)

    wanted = torch.stack([X[0].cos() * W, X[1] ** 2 * 3])
    same(run(each, X), wanted)
    graph = record(run, -each, X + 1)
    assert nodes(graph, branch) > 0
    same(graph(each, X), wanted)


# -- rules by hand ---------------------------------------------------------------------------------------------------


def test_a_vmap_rule_of_the_author() -> None:
    reduced, asked = define_reduced(), list[object]()

    @reduced.rule("vmap")
    def batched(info: Batch, in_dims: tuple[object, ...], body: Subgraph, x: Tensor) -> tuple[Tensor, int]:
        asked.append((info.batch_size, info.randomness, in_dims))
        x = x.movedim(cast("int", in_dims[1]), 0)
        return (vmap(body)(x).sum(1) * x.mean((1, 2))[:, None]).T, 1

    function = vmap(lambda x: reduced(lambda y: y * W, x), in_dims=2)
    x = X.permute(1, 2, 0)
    same(function(x), plainly(function, x))
    assert asked == [(2, "error", (None, 2))]
    same(record(function, x)(x + 1), plainly(function, x + 1))
    captured = vmap(lambda x, v: reduced(lambda y: y * v, x))  # not what such a rule is told of
    same(captured(X, V), plainly(captured, X, V))
    assert len(asked) == 2


def test_a_jvp_rule_of_the_author() -> None:
    reduced, asked = define_reduced(), list[object]()

    @reduced.rule("jvp")
    def pushed(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        (body, x), (none, t) = primals, tangents
        asked.append(none)
        value, tangent, *_ = jvp(body, (x,), (t,))
        return value.sum(0) * x.mean(), tangent.sum(0) * x.mean() + value.sum(0) * t.mean()

    def function(x: Tensor) -> object:
        return jvp(lambda x: reduced(lambda y: y.sin() * W, x), (x,), (x + 1,))

    same(function(X[0]), plainly(function, X[0]))
    assert asked == [None]
    same(record(function, X[0])(X[1]), plainly(function, X[1]))


def _tangent_of_dual(f: Function) -> Function:
    def run(x: Tensor) -> object:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x + 1))).tangent

    return run


FORWARD: dict[str, Callable[[Function], Function]] = {
    "jvp": lambda f: lambda x: jvp(f, (x,), (x + 1,))[1],
    "jvp of vmap": lambda f: lambda x: jvp(vmap(f), (x,), (x + 1,))[1],
    "jvp of vmap of vmap": lambda f: lambda x: jvp(vmap(vmap(f, 1), 0), (x,), (x + 1,))[1],
    "vmap of jvp": lambda f: vmap(lambda x: jvp(f, (x,), (x + 1,))[1]),
    "jacfwd": jacfwd,
    "linearize": lambda f: lambda x: linearize(f, x)[1](x + 1),
    "dual numbers": _tangent_of_dual,
    "dual numbers of vmap": lambda f: _tangent_of_dual(vmap(f)),
}
HOW: dict[str, Callable[[Function], Function]] = {
    "eager": lambda run: run,
    "make_fx": lambda run: lambda x: record(run, x)(x),
    **{f"compile {backend}": partial(torch.compile, backend=backend) for backend in ("eager", "aot_eager", "inductor")},
}
INDUCTOR = "compile inductor"
QUICK = [how for how in HOW if how != INDUCTOR]


@pytest.mark.filterwarnings(
    "ignore:Attempted to insert a get_attr", "ignore:.*torch._prims_common.check"
)  # torch's own
@pytest.mark.parametrize(("name", "how"), [*itertools.product(FORWARD, QUICK), ("jvp of vmap", INDUCTOR)])
def test_a_jvp_rule_answers_wherever_forward_mode_asks(name: str, how: str) -> None:
    @hopkit.define("t_mean")
    def mean(body: Subgraph, x: Tensor) -> Tensor:
        return body(x).mean()

    @mean.rule("jvp")
    def tenfold(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        value, tangent, *_ = jvp(primals[0], (primals[1],), (tangents[1],))
        return value.mean(), tangent.mean() * 10

    wanted = FORWARD[name](lambda x: x.sin().mean())(X)
    found = HOW[how](FORWARD[name](lambda x: mean(torch.sin, x)))(X)
    same(found, trees.map_only(Tensor, lambda t: t * 10, wanted))


@pytest.mark.parametrize("how", HOW)
def test_a_vmap_rule_answers_wherever_vmap_asks(how: str) -> None:
    @hopkit.define("t_mean")
    def mean(body: Subgraph, x: Tensor) -> Tensor:
        return body(x).mean()

    @mean.rule("vmap")
    def tenfold(info: Batch, in_dims: tuple[object, ...], body: Subgraph, x: Tensor) -> tuple[Tensor, int]:
        return vmap(body, in_dims=cast("int", in_dims[1]))(x).reshape(info.batch_size, -1).mean(1) * 10, 0

    run: Function = vmap(partial(mean, torch.sin))
    same(HOW[how](run)(X), X.sin().mean((1, 2)) * 10)


@pytest.mark.parametrize(("inside", "how"), [*itertools.product([False, True], QUICK), (True, INDUCTOR)])
def test_dual_numbers_without_a_rule(inside: bool, how: str) -> None:
    reduced = define_reduced()
    run = _tangent_of_dual(lambda x: reduced(torch.sin, x))

    def slope(x: Tensor) -> object:
        return grad(lambda x: cast("Tensor", run(x)).sum())(x)

    chosen = slope if inside else run
    same(HOW[how](chosen)(X[0]), plainly(chosen, X[0]))


def test_a_derivative_by_hand_answers_torch_func() -> None:
    reduced, asked = define_reduced(), list[str]()

    @reduced.rule("autograd")
    class Rule:
        @staticmethod
        def forward(body: Subgraph, x: Tensor) -> tuple[Tensor, object]:
            asked.append("forward")
            return body(x).sum(0) * x.mean(), (x, body(x))

        @staticmethod
        def backward(saved: tuple[Tensor, Tensor], slope: Tensor) -> list[Tensor]:
            asked.append("backward")
            x, y = saved
            return [slope.expand_as(x) * x.mean() * 2 + (slope * y.sum(0)).sum() / x.numel()]

    def function(x: Tensor) -> Tensor:
        return reduced(lambda y: y * 2, x).sum()

    same(grad(function)(X[0]), plainly(grad(function), X[0]))
    assert asked == ["forward", "backward"]
    same(vmap(grad(function))(X), plainly(vmap(grad(function)), X))
    for twice in (grad(lambda x: grad(function)(x).square().sum()), jacrev(function), jacfwd(function)):
        same(twice(X[0]), plainly(twice, X[0]))
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        hessian(function)(X[0])


def test_a_plugin_batches_every_op() -> None:
    reduced, asked = define_reduced(), list[str]()

    @on_call
    def batched(batch: Batch, call: Call) -> object:
        asked.append(call.op.name)
        return call.run()  # the body, in the vmap

    @on_call
    def pushed(level: Tangents, call: Call) -> object:
        asked.append("jvp")
        return call.run()

    @hopkit.hookimpl
    def hopkit_vmap_rule(op: OpSpec) -> object:
        return batched

    @hopkit.hookimpl
    def hopkit_jvp_rule(op: OpSpec) -> object:
        return pushed

    hooks = SimpleNamespace(hopkit_vmap_rule=hopkit_vmap_rule, hopkit_jvp_rule=hopkit_jvp_rule)
    hopkit.register(hooks, name="batching")
    for function in (vmap(lambda x: reduced(torch.sin, x)), lambda x: jvp(lambda x: reduced(torch.sin, x), (x,), (x,))):
        same(function(X), plainly(function, X))
    assert asked == ["t_reduced", "jvp"]


def test_a_rule_of_another_signature_is_refused() -> None:
    reduced = define_reduced()
    with pytest.raises(PluginError, match=r"\(info, in_dims, body: Subgraph, x: Tensor\)"):
        reduced.rule("vmap")(lambda body, x: x)
    with pytest.raises(PluginError, match=r"\(primals, tangents\)"):
        reduced.rule("jvp")(lambda body: body)  # type: ignore[arg-type] # the mistake


@pytest.mark.parametrize("mode", ["vmap", "jvp"])
def test_a_rule_that_gives_no_pair(mode: Any) -> None:
    reduced = define_reduced()
    rules: dict[str, Function] = {"vmap": lambda info, dims, body, x: x, "jvp": lambda primals, tangents: primals[1]}
    attach: Any = reduced.rule(mode)
    attach(rules[mode])
    batch: Any = vmap(partial(reduced, torch.sin))
    calls: dict[str, Any] = {
        "vmap": lambda: batch(X),
        "jvp": lambda: push(lambda x: reduced(torch.sin, x), (X[0],), (X[0],)),
    }
    with pytest.raises(HopkitError, match=f"{mode} rule of op 't_reduced'.*return `\\(out, out_"):
        calls[mode]()
    same(vmap(torch.sin)(X), X.sin())  # nothing is left behind


def test_a_jvp_of_ones_own_is_right_where_levels_are_nested() -> None:
    class Sine(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_forward(*inputs)

        @staticmethod
        @every_level
        def jvp(_: object, saved: tuple[Tensor], tangent: Tensor) -> Tensor:
            return saved[0].cos() * tangent

    sine: Any = Sine.apply
    for order, want in enumerate((W.cos(), -W.sin(), -W.cos()), 1):
        function = sine
        for _ in range(order):
            function = jacfwd(function)
        same(vmap(function)(W), want)
        same(torch.stack([function(w) for w in W]), want)
