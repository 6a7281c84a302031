"""Properties: what an op writes to, aliases, draws or does besides stays right, declared or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import HopkitWarning, Subgraph
from hopkit.errors import AutogradError, PropertyError
from tests.recording import define_once, nodes, plainly, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

Function = Callable[..., Any]


def aot(function: Function, *args: Tensor) -> Function:
    compiled: Function = aot_function(function, lambda graph, _: make_boxed_func(graph.forward))
    compiled(*args)
    return compiled


RECORDERS: dict[str, Callable[..., Function]] = {
    "eager": lambda function, *args: function,
    "functionalize": lambda function, *args: functionalize(function),
    "make_fx": lambda function, *args: make_fx(function)(*args),
    "make_fx symbolic": lambda function, *args: make_fx(function, tracing_mode="symbolic")(*args),
    "make_fx pre-dispatch": lambda function, *args: make_fx(function, pre_dispatch=True)(*args),
    "make_fx functionalize": lambda function, *args: make_fx(functionalize(function))(*args),
    "aot": aot,
    "compile": lambda function, *args: torch.compile(function, backend="aot_eager", fullgraph=True),
}
RECORDED = [name for name in RECORDERS if name.startswith(("make_fx", "aot"))]


def inputs() -> list[Tensor]:
    return [torch.linspace(-1.0, 1.0, 9).reshape(3, 3), torch.linspace(0.5, 1.5, 9).reshape(3, 3)]


def compare(function: Function, recorded: Function) -> None:
    """The results, and what is in the arguments afterwards."""
    mine, others = inputs(), inputs()
    same((recorded(*mine), mine), (plainly(function, *others), others))


def pair(body: Subgraph[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    return body(x)


# (function of the op, x and w; what the warning says)
UNDECLARED: dict[str, tuple[Function, str]] = {
    "writes to an operand": (lambda op, x, w: op(lambda y: (y.add_(1) * 2, y.sin()), x), "writes to operand 'x'"),
    "writes to a capture": (
        lambda op, x, w: op(lambda y: (w.add_(1) * y, y.sin()), x),
        "writes to 'w', which subgraph 'body' closes over",
    ),
    "view of an operand": (lambda op, x, w: op(lambda y: (y[0], y.sin()), x)[0].add_(1), "view of operand 'x'"),
    "view of a capture": (
        lambda op, x, w: op(lambda y: (w.t(), y.sin()), x)[0].add_(1),
        "view of 'w', which subgraph 'body' closes over",
    ),
    "outputs that share": (
        lambda op, x, w: op(lambda y: (lambda z: (z, z[0]))(y * w), x)[0].add_(1),
        "two outputs share memory",
    ),
}
FINE: dict[str, Function] = {
    "writes to a temporary": lambda op, x, w: op(lambda y: ((y * w).add_(1), y.sin()), x),
    "output is an operand": lambda op, x, w: op(lambda y: (y, y * w), x)[0].add_(1),
    "output is a capture": lambda op, x, w: op(lambda y: (w, y * w), x)[0].add_(1),
    "output written to later": lambda op, x, w: op(lambda y: (y * w, y.sin()), x)[0].add_(1),
    "one output twice": lambda op, x, w: op(lambda y: (lambda z: (z, z))(y * w), x)[0].add_(1),
}


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("name", FINE)
def test_what_a_node_can_say_is_right_without_a_word(name: str, recorder: str) -> None:
    op = hopkit.define("t_pair")(pair)

    def run(x: Tensor, w: Tensor) -> object:
        return FINE[name](op, x, w)

    torch.compiler.reset()
    compare(run, RECORDERS[recorder](run, *inputs()))


@pytest.mark.parametrize("recorder", RECORDED)
@pytest.mark.parametrize("name", UNDECLARED)
def test_what_was_not_declared_decomposes_with_one_warning(name: str, recorder: str) -> None:
    op = hopkit.define("t_pair")(pair)
    use, told = UNDECLARED[name]

    def run(x: Tensor, w: Tensor) -> object:
        return use(op, x, w)

    with pytest.warns(HopkitWarning, match=f"op 't_pair' is not kept.*{told}") as caught:
        recorded = RECORDERS[recorder](run, *inputs())
    assert len({str(warning.message) for warning in caught}) == 1
    compare(run, recorded)


@pytest.mark.parametrize("name", UNDECLARED)
def test_what_was_not_declared_is_read_in_place(name: str) -> None:
    op = hopkit.define("t_pair")(pair)

    def run(x: Tensor, w: Tensor) -> object:
        return UNDECLARED[name][0](op, x, w)

    torch.compiler.reset()
    with pytest.warns(HopkitWarning, match="op 't_pair' is not kept"):
        compare(run, RECORDERS["compile"](run, *inputs()))


@pytest.mark.parametrize("recorder", ["eager", "functionalize"])
@pytest.mark.parametrize("name", UNDECLARED)
def test_nothing_is_said_where_nothing_is_recorded(name: str, recorder: str) -> None:
    op = hopkit.define("t_pair")(pair)

    def run(x: Tensor, w: Tensor) -> object:
        return UNDECLARED[name][0](op, x, w)

    torch.compiler.reset()
    compare(run, RECORDERS[recorder](run, *inputs()))


@pytest.mark.parametrize("name", UNDECLARED)
def test_strict_makes_it_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPKIT_STRICT", "1")
    op = hopkit.define("t_pair")(pair)
    use, told = UNDECLARED[name]
    with pytest.raises(PropertyError, match=told):
        record(lambda x, w: use(op, x, w), *inputs())


@pytest.mark.parametrize("training", [False, True])
def test_batch_statistics(training: bool) -> None:
    once = define_once()

    def step(x: Tensor, mean: Tensor, var: Tensor) -> object:
        y = once(lambda y: torch.nn.functional.batch_norm(y, mean, var, training=True), x)
        return torch.autograd.grad((y * y).sum() + y[0].sum(), x) if training else y

    def fresh() -> list[Tensor]:
        return [inputs()[0].requires_grad_(training), torch.zeros(3), torch.ones(3)]

    with pytest.warns(HopkitWarning, match="writes to 'mean'"):
        graph = record(step, *fresh())
    mine, others = fresh(), fresh()
    same((graph(*mine), mine), (plainly(step, *others), others))


@pytest.mark.parametrize("recorder", RECORDERS)
def test_declared_writes(recorder: str) -> None:
    @hopkit.define("t_update", mutates=("x",))
    def update(body: Subgraph, x: Tensor, y: Tensor) -> Tensor:
        x.add_(body(y))
        return body(x)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return update(lambda y: y * w, x, w)

    torch.compiler.reset()
    compare(run, RECORDERS[recorder](run, *inputs()))


@pytest.mark.parametrize("recorder", RECORDERS)
def test_declared_aliases(recorder: str) -> None:
    @hopkit.define("t_view", aliases=("x",))
    def view(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return view(lambda y: y[0], x).add_(1)

    torch.compiler.reset()
    compare(run, RECORDERS[recorder](run, *inputs()))


def test_a_schema_marks_what_is_written_to() -> None:
    @hopkit.define("t_update", mutates=("x",))
    def update(body: Subgraph, x: Tensor, y: Tensor) -> Tensor:
        return body(x)

    @hopkit.define("t_other")
    def other(body: Subgraph, x: Tensor, y: Tensor) -> Tensor:
        return body(x)

    (node,) = (
        n for n in record(lambda x, w: other(torch.sin, x, w), *inputs()).graph.nodes if n.target is other.operator
    )
    graph = torch.fx.symbolic_trace(lambda x: (x.sin(),))
    assert "Tensor input0" in str(other.operator.gen_schema(graph, tuple(inputs()), **node.kwargs))
    assert "Tensor(a1!) input0" in str(update.operator.gen_schema(graph, tuple(inputs()), **node.kwargs))


def test_random_numbers_come_from_torch() -> None:
    @hopkit.define("t_noise", random=True)
    def noise(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) + torch.rand(3)

    def run(x: Tensor) -> Tensor:
        return noise(torch.nn.functional.dropout, x)

    graph = record(run, inputs()[0])
    assert nodes(graph, noise) == 1
    torch.manual_seed(0)
    want = plainly(run, inputs()[0])
    torch.manual_seed(0)
    same(graph(inputs()[0]), want)


@pytest.mark.parametrize("recorder", ["make_fx", "make_fx functionalize", "aot"])
def test_an_effect_is_never_removed(recorder: str) -> None:
    seen: list[int] = []

    @hopkit.define("t_log", effectful=True, pure=False)
    def log(body: Subgraph, x: Tensor) -> Tensor:
        seen.append(1)
        return body(x)

    def run(x: Tensor, w: Tensor) -> Tensor:
        log(torch.sin, x)
        return x * 2

    recorded = RECORDERS[recorder](run, *inputs())
    if isinstance(recorded, torch.fx.GraphModule):
        recorded.graph.eliminate_dead_code()
        recorded.recompile()
    seen.clear()
    recorded(*inputs())
    assert seen == [1]


def test_what_has_no_effect_may_be_removed() -> None:
    once = define_once()
    graph = record(lambda x, w: (once(torch.sin, x), x * 2)[1], *inputs())
    graph.graph.eliminate_dead_code()
    assert nodes(graph, once) == 0


def test_an_effect_in_a_graph_that_trains_is_refused() -> None:
    @hopkit.define("t_log", effectful=True)
    def log(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    x = inputs()[0].requires_grad_()
    with pytest.raises(AutogradError, match="op 't_log' cannot be recorded for training: it has an effect"):
        record(lambda x: torch.autograd.grad(log(torch.sin, x).sum(), x), x)
