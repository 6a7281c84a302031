"""Counters and observers: what they see of an op is what they see of its body, and the op by name where they log names.

Every test runs the op in eager and as a node of a recorded graph.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.flop_counter import FlopCounterMode

import hopkit
from hopkit import Op, Subgraph
from tests.recording import define_twice, record, same, trained

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)

# torch has no public name for these two.
DebugMode: Any = importlib.import_module("torch.utils._debug_mode").DebugMode
MemTracker: Any = importlib.import_module("torch.distributed._tools.mem_tracker").MemTracker


def plain(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `define_twice` defines, as a function."""
    result: Tensor = 1.0 * body(body(x))
    return result


def both(op: Op[..., Tensor], body: Callable[[Tensor], Tensor]) -> list[Callable[[Tensor], Any]]:
    return [lambda x: op(body, x), record(lambda x: op(body, x), X)]


class Model(nn.Module):
    """A module whose submodule is called by a subgraph, and another one that is not."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.call = nn.Linear(3, 3), nn.Linear(3, 3), call

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outer(self.call(lambda y: self.inner(y).sin(), x))
        return result


# FLOPs


def flops(function: Callable[[Tensor], object], x: Tensor) -> dict[str, dict[str, int]]:
    with FlopCounterMode(display=False) as counter:
        function(x)
    return {where: {str(op): n for op, n in of.items()} for where, of in counter.get_flop_counts().items()}


def training(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    return lambda x: model(x).sum().backward()


@pytest.mark.parametrize("how", [lambda model: model, training], ids=["forward", "backward"])
def test_flops_are_counted_per_module(how: Callable[..., Any]) -> None:
    x = X.clone().requires_grad_()
    found = flops(how(Model(define_twice())), x)
    assert found == flops(how(Model(plain)), x)
    assert found["Model.inner"]["aten.addmm"] == 2 * 2 * 4 * 3 * 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_flops_of_compiled_code_are_those_of_the_body(backend: str) -> None:
    x, twice = X.clone().requires_grad_(), define_twice()

    def compiled(call: Callable[..., Tensor]) -> dict[str, int]:
        function = torch.compile(lambda x: call(lambda y: (y @ W).sin(), x), backend=backend)
        function(x)  # compiling counts as well
        return flops(training(function), x)["Global"]

    assert compiled(twice) == compiled(plain)


def test_flops_of_a_recorded_graph_are_those_of_the_body() -> None:
    twice, w = define_twice(), W.clone().requires_grad_()

    def step(call: Callable[..., Tensor]) -> Callable[..., object]:
        return lambda x, w: call(lambda y: (y @ w).sin(), x)

    x = X.clone().requires_grad_()
    for train in (False, True):
        graphs = [record(trained(step(call)) if train else step(call), x, w) for call in (twice, plain)]
        counts = [flops(functools.partial(graph, X), w)["Global"] for graph in graphs]
        if train:  # the recorded backward computes the forward again: docs/explanation/limits.md
            assert counts[0]["aten.mm"] == counts[1]["aten.mm"] + 2 * 2 * 4 * 3 * 3
        else:
            assert counts[0] == counts[1]


def test_flops_of_a_graph_that_is_differentiated_are_those_of_the_body() -> None:
    w = W.clone().requires_grad_()
    graphs = [record(lambda x, c=call: c(lambda y: (y @ w).sin(), x), X) for call in (define_twice(), plain)]
    counts = [flops(training(graph), X.clone().requires_grad_())["Global"] for graph in graphs]
    assert counts[0] == counts[1]


def test_flops_of_a_kernel_written_by_hand_are_those_of_the_body() -> None:
    twice = define_twice()

    @twice.rule("device")
    def kernel(body: Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x.clone()

    assert flops(lambda x: twice(lambda y: y @ W, x), X) == flops(lambda x: plain(lambda y: y @ W, x), X)


# The profiler, and torch's DebugMode


def test_a_profile_has_the_op_and_its_inside_in_it() -> None:
    for run in both(define_twice(), torch.sin):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(X)
        inside = [event for event in profile.events() if event.name == "aten::sin"]
        assert [event.cpu_parent.name for event in inside] == ["t_twice"] * 2


def test_a_profile_has_the_inside_of_backward_in_it() -> None:
    x = X.clone().requires_grad_()
    for run in both(define_twice(), torch.sin):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(x).sum().backward()
        assert [event.name for event in profile.events()].count("aten::cos") == 2


def logged(run: Callable[[Tensor], object], x: Tensor) -> list[tuple[int, str]]:
    """Depth and name of every line of the log."""
    with DebugMode() as mode:
        run(x)
    lines = mode.debug_string().splitlines()
    return [(len(line) - len(line.lstrip()), line.strip().partition("(")[0]) for line in lines]


def test_a_debug_log_has_the_op_and_its_inside_below_it() -> None:
    for run in both(define_twice(), torch.sin):
        (depth, name), *inside = logged(run, X)
        assert name == "[record function] t_twice"
        assert [name for _, name in inside] == ["aten::sin", "aten::sin", "aten::mul.Tensor"]
        assert all(deeper > depth for deeper, _ in inside)


def test_a_debug_log_has_the_inside_of_backward() -> None:
    def names_of(call: Callable[..., Tensor]) -> list[str]:
        step = training(lambda x: call(torch.sin, x))
        return [name for _, name in logged(step, X.clone().requires_grad_())]

    names, wanted = names_of(define_twice()), names_of(plain)
    assert names == ["[record function] t_twice", *wanted]


def test_a_debug_log_has_an_op_with_a_kernel_by_hand() -> None:
    twice = define_twice()

    @twice.rule("device")
    def kernel(body: Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * body(body(x))

    with torch.no_grad():
        names = [name for _, name in logged(lambda x: twice(torch.sin, x), X)]
    assert names == ["[record function] t_twice", "aten::sin", "aten::sin", "aten::mul.Tensor"]


def test_ops_within_ops_are_below_them_in_a_debug_log() -> None:
    twice = define_twice()

    @hopkit.define("t_around")
    def around(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) + x

    depths = {name: depth for depth, name in logged(lambda x: around(lambda y: twice(torch.sin, y), x), X)}
    assert depths["[record function] t_around"] < depths["[record function] t_twice"] < depths["aten::sin"]
    assert depths["aten::add.Tensor"] < depths["aten::sin"]


@pytest.mark.parametrize("observer", [DebugMode, lambda: FlopCounterMode(display=False)], ids=["debug", "flops"])
def test_an_observer_changes_no_value_and_no_gradient(observer: Callable[[], Any]) -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    twice = define_twice()
    step = trained(lambda x, w: twice(lambda y: (y @ w).sin(), x))
    wanted = trained(lambda x, w: plain(lambda y: (y @ w).sin(), x))(x, w)
    graph = record(lambda x: twice(lambda y: (y @ w).sin(), x), X)
    with observer():
        same(step(x, w), wanted)
        same(trained(lambda x, w: graph.forward(x))(x, w), wanted)


# Memory, and collectives


def peak(model: Callable[[Tensor], Tensor]) -> Any:
    tracker = MemTracker()
    with tracker:
        training(model)(torch.ones(64, 3, requires_grad=True))
    return tracker.get_tracker_snapshot("peak")


def test_memory_that_is_tracked_is_that_of_the_body() -> None:
    def of(call: Callable[..., Tensor]) -> dict[str, object]:
        return {str(k): {str(kind): n for kind, n in v.items()} for k, v in peak(Model(call)).items()}

    assert of(define_twice()) == of(plain)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_inside_are_counted(group: None) -> None:
    def reduced(y: Tensor) -> Tensor:
        y = y.clone()
        dist.all_reduce(y)
        return y

    twice = define_twice()
    for call in (twice, plain):
        with CommDebugMode() as mode, torch.no_grad():
            call(reduced, X)
        assert mode.get_total_counts() == 2
