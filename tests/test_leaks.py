"""Nothing is kept of a call: no tensor, no graph. Counted as the garbage collector sees it."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import hopkit
from hopkit import Op
from hopkit._torch.snapshot import forget_traces
from hopkit.kit import Kit
from tests.recording import define_twice, record

X = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)


def alive() -> Counter[str]:
    """How many tensors, graphs, functions and others there are, without what torch keeps of every trace: the text of
    graphs, and what an operator gave on stand-ins."""
    forget_traces()
    gc.collect()
    return Counter(type(value).__qualname__ for value in gc.get_objects())


def grown(work: Callable[[], object], times: int) -> dict[str, int]:
    """By kind, what there is more of after so many times: at least one for every fourth."""
    gc.freeze()  # what is there already is not looked at: it takes a second each time
    try:
        for _ in range(3):
            work()
        before = alive()
        for _ in range(times):
            work()
        after = alive()
    finally:
        gc.unfreeze()
    return {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind] > times // 4}


def closing(op: Op[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """A call that closes over a tensor of its own."""
    return over(op, torch.rand(3, 3, requires_grad=True))


def over(op: Op[..., Tensor], w: Tensor) -> Callable[[Tensor], Tensor]:
    """A call that closes over ``w``."""
    return lambda x: op(lambda y: y @ w, x)


def test_eager_calls_leave_nothing(hopkit_fresh: Kit) -> None:
    op = define_twice()
    assert grown(lambda: closing(op)(X), 10_000) == {}


def test_eager_training_leaves_nothing(hopkit_fresh: Kit) -> None:
    op = define_twice()
    assert grown(lambda: closing(op)(X).sum().backward(), 1_000) == {}


def train(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
    return lambda x: torch.autograd.grad(call(x).sum(), x)


HELD = {"Tensor", "Parameter", "FakeTensor", "GraphModule", "Graph", "Node", "function", "cell", "Layout", "Call"}

TRACES: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "make_fx": lambda call: record(call, X),
    "symbolic": lambda call: record(call, X, mode="symbolic"),
    "training": lambda call: record(train(call), X.clone().requires_grad_()),
    "vmap": lambda call: record(torch.vmap(call), X[None]),
    "jvp": lambda call: record(lambda x: torch.func.jvp(call, (x,), (x,)), X),
    "functionalize": lambda call: record(torch.func.functionalize(call), X),
    "run": lambda call: record(call, X)(X),
    "eager vmap": lambda call: torch.vmap(call)(X[None]),
    "eager grad": lambda call: torch.func.grad(lambda x: call(x).sum())(X),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own decompositions
@pytest.mark.parametrize("how", TRACES)
def test_traces_leave_nothing(how: str, hopkit_fresh: Kit) -> None:
    op, trace = define_twice(), TRACES[how]
    more = grown(lambda: trace(closing(op)), 8)
    # torch caches what it found out of symbolic sizes, for the last few hundred questions, with hopkit and without.
    assert (more.keys() & HELD if how == "symbolic" else more.keys()) == set()


def test_a_capture_a_graph_and_a_result_go_when_the_caller_lets_go(hopkit_fresh: Kit) -> None:
    op = define_twice()
    w = torch.rand(3, 3, requires_grad=True)
    graph = record(train(over(op, w)), X.clone().requires_grad_())
    subgraph = next(m for m in graph.modules() if isinstance(m, GraphModule) and m is not graph)
    result = graph(X.clone().requires_grad_())
    refs = [weakref.ref(value) for value in (w, graph, subgraph, result[0])]
    del w, graph, subgraph, result
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_an_op_goes_when_it_is_undefined(hopkit_fresh: Kit) -> None:
    op = define_twice()
    record(over(op, X), X)
    ref = weakref.ref(op)
    hopkit.undefine(op)
    del op
    gc.collect()
    assert ref() is None
