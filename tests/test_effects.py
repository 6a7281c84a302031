"""Effects keep their order and are never removed; random numbers are drawn once; what is not pure is not shared."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import hopkit
from hopkit import Op, Subgraph
from hopkit.digest import cacheable
from hopkit.errors import AutogradError
from tests.recording import nodes, plainly, record, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's, of its own code
]

Function = Callable[..., Any]


def inputs() -> list[Tensor]:
    return [torch.linspace(-1.0, 1.0, 9).reshape(3, 3), torch.linspace(0.5, 1.5, 9).reshape(3, 3)]


def leaves() -> list[Tensor]:
    return [t.requires_grad_() for t in inputs()]


def ahead(function: Function) -> tuple[Function, list[GraphModule]]:
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_function(function, keep), graphs


def without_dead_code(graph: GraphModule) -> GraphModule:
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


RECORDERS: dict[str, Callable[[Function], Function]] = {
    "make_fx": lambda run: without_dead_code(make_fx(run)(*inputs())),
    "make_fx pre-dispatch": lambda run: without_dead_code(make_fx(run, pre_dispatch=True)(*inputs())),
    "make_fx functionalize": lambda run: without_dead_code(make_fx(torch.func.functionalize(run))(*inputs())),
    "functionalize": torch.func.functionalize,
    "aot": lambda run: ahead(run)[0],
    "compile": lambda run: torch.compile(run, backend="aot_eager", fullgraph=True),
    "inductor": lambda run: torch.compile(run, fullgraph=True, options={"fallback_random": True}),
}


class Log:
    """Two ops that write down what they are called with; one of them writes to an operand, too."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, float]] = []

        @hopkit.define("t_log", effectful=True)
        def log(body: Subgraph, x: Tensor, *, name: str) -> Tensor:
            self._note(name, x)
            return body(x)

        @hopkit.define("t_say", effectful=True, mutates=("x",))
        def say(body: Subgraph, x: Tensor, y: Tensor, *, name: str) -> None:
            self._note(name, x)
            x.add_(body(y))

        self.log: Op[..., Tensor] = log
        self.say: Op[..., None] = say

    def _note(self, name: str, x: Tensor) -> None:
        if type(x) is Tensor:  # a stand-in has no value to write down
            self.lines.append((name, round(x.sum().item(), 4)))

    def of(self, function: Function, *args: Tensor) -> list[tuple[str, float]]:
        self.lines.clear()
        function(*args)
        return list(self.lines)


def unused(log: Log, x: Tensor, w: Tensor) -> Tensor:
    log.log(torch.sin, x, name="first")
    log.log(lambda y: y * w, w, name="second")
    result = log.log(torch.cos, x * 2, name="third")
    log.log(torch.sin, x, name="first")
    return result


def writing(log: Log, x: Tensor, w: Tensor) -> Tensor:
    log.say(lambda y: y * w, x, w, name="first")
    log.log(torch.sin, x, name="second")
    log.say(torch.cos, x, w, name="third")
    return x * 2


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("use", [unused, writing])
def test_effects_stay_in_order(use: Function, recorder: str) -> None:
    log = Log()

    def run(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = use(log, x, w)
        return result

    torch.compiler.reset()
    with torch.no_grad():
        recorded = RECORDERS[recorder](run)
        recorded(*inputs())
        assert log.of(recorded, *inputs()) == log.of(run, *inputs())
        mine, others = inputs(), inputs()
        same((recorded(*mine), mine), (run(*others), others))


def test_aot_autograd_threads_a_token() -> None:
    log = Log()
    recorded, graphs = ahead(lambda x, w: writing(log, x, w))
    recorded(*inputs())
    threaded = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects)
    assert [node.args[1] for node in threaded] == [log.say.operator, log.log.operator, log.say.operator]
    for before, after in itertools.pairwise(threaded):
        assert after.args[0].args == (before, 0)


@pytest.mark.parametrize("recorder", ["make_fx", "aot", "compile", "inductor"])
def test_an_effect_within_a_subgraph(recorder: str) -> None:
    log = Log()

    @hopkit.define("t_outer")
    def outer(body: Subgraph, x: Tensor) -> Tensor:
        return body(body(x))

    def run(x: Tensor, w: Tensor) -> Tensor:
        log.log(torch.sin, x, name="before")
        result = outer(lambda y: log.log(lambda z: z * w, y, name="inside"), x)
        log.log(torch.sin, result, name="after")
        return result

    torch.compiler.reset()
    with torch.no_grad():
        recorded = RECORDERS[recorder](run)
        recorded(*inputs())
        assert log.of(recorded, *inputs()) == log.of(run, *inputs())


def test_what_had_an_effect_has_none_under_another_name() -> None:
    log = Log()
    ahead(lambda x, w: unused(log, x, w))[0](*inputs())

    @hopkit.define("t_log", replace=True)
    def quiet(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    graph = record(lambda x: (quiet(torch.sin, x), x * 2)[1], inputs()[0])
    assert nodes(without_dead_code(graph), quiet) == 0


@pytest.mark.parametrize("recorder", ["make_fx", "aot", "compile", "inductor"])
def test_an_effect_in_training_is_refused(recorder: str) -> None:
    log = Log()

    def step(x: Tensor, w: Tensor) -> Tensor:
        return log.log(lambda y: y * w, x, name="trained").sum()

    def run() -> None:
        if recorder == "make_fx":
            record(trained(step), *leaves())
        else:
            trained(RECORDERS[recorder](step))(*leaves())

    torch.compiler.reset()
    with pytest.raises(Exception, match="op 't_log' cannot be recorded for training: it has an effect") as caught:
        run()
    assert isinstance(caught.value, AutogradError) or type(caught.value).__name__ == "BackendCompilerFailed"


# -- random numbers --------------------------------------------------------------------------------------------------


def dropped(random: bool) -> Op[..., Tensor]:
    @hopkit.define("t_dropped", random=random)
    def op(body: Subgraph, x: Tensor) -> Tensor:
        return body(body(x)) * torch.rand_like(x)

    return op


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    ("recorder", "kept"),
    [*((name, False) for name in (*RECORDERS, "make_fx training")), ("compile", True), ("inductor", True)],
)
def test_random_numbers_are_those_of_eager(recorder: str, kept: bool, random: bool) -> None:
    """In forward and in backward, alone and where a checkpoint draws them again."""
    op = dropped(random)

    def part(x: Tensor, w: Tensor) -> Tensor:
        return op(lambda y: torch.nn.functional.dropout(y * w), x).sin()

    def run(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = checkpoint(part, x, w, use_reentrant=False) if kept else part(x, w)
        return result + torch.rand(3)

    def seeded(function: Function, *args: Tensor) -> object:
        torch.manual_seed(0)
        return function(*args)

    torch.compiler.reset()
    trains = recorder in ("aot", "compile", "inductor", "make_fx training")
    if recorder == "make_fx training":
        recorded: Function = make_fx(trained(run))(*leaves())
    else:
        recorded = trained(RECORDERS[recorder](run)) if trains else RECORDERS[recorder](run)
    make = leaves if trains else inputs
    want = plainly(seeded, trained(run) if trains else run, *make())
    seeded(recorded, *make())  # compiles
    same(seeded(recorded, *make()), want)


# -- pure ------------------------------------------------------------------------------------------------------------


def counting() -> tuple[Op[..., Tensor], list[float]]:
    state = [1.0]

    @hopkit.define("t_count", pure=False)
    def count(body: Subgraph, x: Tensor) -> Tensor:
        state[0] *= 2
        return body(x) * state[0]

    return count, state


def test_what_is_not_pure_is_not_cached() -> None:
    count, _ = counting()

    @hopkit.define("t_pure")
    def pure(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    assert cacheable(pure.spec)
    assert not cacheable(count.spec)
    record(lambda x: count(torch.sin, x), inputs()[0])
    assert not count.operator.cacheable()


def test_calls_of_what_is_not_pure_stay_apart() -> None:
    count, state = counting()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return count(torch.sin, x) + count(torch.sin, x)

    for recorded in (record(run, *inputs()), make_fx(torch.func.functionalize(run))(*inputs()), ahead(run)[0]):
        recorded(*inputs())
        state[0] = 1.0
        same(recorded(*inputs()), inputs()[0].sin() * (2 + 4))
        if isinstance(recorded, GraphModule):
            assert nodes(recorded, count) == 2


def test_derivatives_of_what_is_not_pure_stay_apart() -> None:
    @hopkit.define("t_reading", pure=False)
    def reading(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) * scale[0]

    scale = [1.0]

    def run(x: Tensor, w: Tensor) -> Tensor:
        scale[0] = 2.0
        first = reading(lambda y: y * w, x)
        scale[0] = 5.0
        return first + reading(lambda y: y * w, x)

    want = plainly(trained(run), *leaves())
    same(trained(ahead(run)[0])(*leaves()), want)
    same(record(trained(run), *leaves())(*leaves()), want)


LOST: dict[str, Callable[[Function], Function]] = {
    "vmap": lambda call: lambda x: torch.vmap(call)(x),
    "grad": lambda call: torch.func.grad(lambda x: call(x).sum()),
    "jvp": lambda call: lambda x: torch.func.jvp(call, (x,), (x,)),
    "checkpoint": lambda call: lambda x: checkpoint(call, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", LOST)
def test_an_effect_that_a_graph_would_not_have_is_refused(name: str) -> None:
    log = Log()
    run = LOST[name](lambda x: log.log(torch.sin, x, name="lost"))
    with pytest.raises(hopkit.CallError, match="has an effect, and cannot be recorded here"):
        record(run, inputs()[0])


@pytest.mark.parametrize("name", ["vmap", "grad"])
def test_an_effect_that_an_exported_program_would_not_have_is_refused(name: str) -> None:
    log = Log()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return LOST[name](lambda x: log.log(torch.sin, x, name="lost"))(x)  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match="'t_log' has an effect, and cannot be recorded here"):
        torch.export.export(Model(), (inputs()[0],), strict=True)


def test_an_op_that_is_not_used_and_has_an_effect_inside() -> None:
    log = Log()

    @hopkit.define("t_around")
    def around(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    def run(x: Tensor) -> Tensor:
        around(lambda y: log.log(torch.sin, y, name="inside"), x)
        return x + 1

    for recorded in (without_dead_code(record(run, inputs()[0])), torch.compile(run, backend="aot_eager")):
        recorded(inputs()[0])
        assert log.of(recorded, inputs()[0]) == log.of(run, inputs()[0])
