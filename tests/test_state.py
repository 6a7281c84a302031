"""The short cut misses nothing: every piece of global and thread-local state that torch has sees what it should."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import hopkit
from hopkit import Op, Subgraph
from hopkit._torch.autograd import below_autograd
from tests.modes import Boxed, Names
from tests.recording import define_once, define_twice, nodes, plainly, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)
JIT = "ignore:`torch.jit.script` is deprecated"  # torch's own decompositions


def both(op: Op[..., Tensor], body: Callable[..., object]) -> list[Callable[[Tensor], Any]]:
    """The op, and a graph with it as a node."""
    return [lambda x: op(body, x), record(lambda x: op(body, x), X)]


class Subtracts(TorchFunctionMode):
    """Subtracts where it should add."""

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        chosen: Any = torch.sub if func is torch.add else func
        return chosen(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_inside() -> None:
    for run in both(define_once(), torch.sin):
        with Names() as seen:
            run(X)
        assert seen.names == ["aten.sin.default"]


def test_a_function_mode_sees_the_inside() -> None:
    @hopkit.define("t_add")
    def add(body: Subgraph, x: Tensor) -> Tensor:
        return torch.add(body(x), x)

    with Subtracts():
        same(add(lambda y: torch.add(y, W), X), (X - W) - X)
        graph = record(lambda x: add(lambda y: torch.add(y, W), x), X)
    same(graph(X), (X - W) - X)


def test_a_default_device_reaches_the_body() -> None:
    @hopkit.define("t_zeros")
    def zeros(body: Subgraph, x: Tensor) -> Tensor:
        return body(x) + torch.zeros(3)

    with torch.device("meta"):
        graph = record(lambda x: zeros(lambda y: y.to("meta"), x), X)
        assert zeros(lambda y: y.to("meta"), X).is_meta
    assert graph(X).is_meta


def test_a_wrapper_subclass_sees_the_inside() -> None:
    for run in both(define_twice(), lambda y: y * 2):
        got = run(Boxed(X))
        assert isinstance(got, Boxed)
        same(got.held, X * 4)


def test_a_captured_wrapper_subclass() -> None:
    twice, boxed = define_twice(), Boxed(W)
    got = twice(lambda y: y * boxed, X)
    assert isinstance(got, Boxed)
    same(got.held, X * W * W)


def test_a_wrapper_subclass_is_recorded_from_the_inside() -> None:
    twice = define_twice()
    graph = record(lambda x: cast(Boxed, twice(lambda y: y * 2, Boxed(x))).held, X)
    same(graph(W), W * 4)


def test_a_wrapper_subclass_under_compile() -> None:
    twice = define_twice()
    torch.compiler.reset()
    got = torch.compile(lambda x: twice(lambda y: y * 2, x), backend="aot_eager", fullgraph=True)(Boxed(X))
    assert isinstance(got, Boxed)
    same(got.held, X * 4)


def test_the_functional_wrapper() -> None:
    twice = define_twice()

    def run(x: Tensor) -> Tensor:
        y = twice(lambda y: y.mul_(2), x.clone())
        return y.add_(1)

    same(torch.func.functionalize(run)(X), X * 4 + 1)


def test_vmap_grad_and_jvp() -> None:
    for run in both(define_twice(), lambda y: (y * W).sin()):
        plain = both(define_plain(), lambda y: (y * W).sin())[0]
        batch = torch.stack([X, W])
        same(torch.vmap(run)(batch), torch.vmap(plain)(batch))
        same(torch.func.grad(lambda x: run(x).sum())(X), torch.func.grad(lambda x: plain(x).sum())(X))  # noqa: B023
        same(torch.func.jacrev(run)(X), torch.func.jacrev(plain)(X))


def define_plain() -> Any:
    """As `define_twice`, and no op."""
    return lambda body, x: body(body(x))


@pytest.mark.filterwarnings(JIT)
def test_forward_mode() -> None:
    for run in both(define_twice(), lambda y: y * W):
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(X, W))).tangent
        same(tangent, W * W * W)


@pytest.mark.filterwarnings(JIT)
def test_forward_mode_through_a_capture() -> None:
    twice = define_twice()

    def run(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            w = forward_ad.make_dual(W, X)
            tangent: Tensor = forward_ad.unpack_dual(twice(lambda y: y * w, x)).tangent
            return tangent

    same(run(X), 2 * X * W * X)
    same(record(run, X)(X), 2 * X * W * X)


def test_autocast() -> None:
    once = define_once()
    with torch.autocast("cpu", torch.bfloat16):
        assert once(lambda y: y @ W, X).dtype is torch.bfloat16
        assert record(lambda x: once(lambda y: y @ W, x), X)(X).dtype is torch.bfloat16


def test_inference_mode() -> None:
    twice = define_twice()
    with torch.inference_mode():
        got = twice(lambda y: y * W, X)
        graph = record(lambda x: twice(lambda y: y * W, x), X)
        assert got.is_inference()
        assert nodes(graph, twice) == 1
        same(graph(X), got)
    same(graph(X), X * W * W)


def test_no_grad() -> None:
    w = W.clone().requires_grad_()
    for run in both(define_twice(), lambda y: y * w):
        with torch.no_grad():
            assert not run(X).requires_grad
        assert run(X).requires_grad


def test_raw_dispatch_keys() -> None:
    w = W.clone().requires_grad_()
    for run in both(define_twice(), lambda y: y * w):
        with below_autograd():
            assert not run(X).requires_grad


def test_pre_dispatch() -> None:
    twice = define_twice()

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return twice(lambda y: y * W, x)

    graph = make_fx(run, pre_dispatch=True)(X)
    assert nodes(graph, twice) == 1
    same(graph(W), W * W * W)


def test_the_python_dispatcher() -> None:
    twice = define_twice()
    # torch has no public way to turn it on.
    with importlib.import_module("torch._dispatch.python").enable_python_dispatcher():
        same(twice(lambda y: y * W, X), X * W * W)
        graph = record(lambda x: twice(lambda y: y * W, x), X)
        same(graph(X), X * W * W)
    assert nodes(graph, twice) == 1


def test_a_profiler_sees_the_op_by_name() -> None:
    twice = define_twice()
    with torch.profiler.profile() as profile:
        twice(torch.sin, X)
    names = [event.name for event in profile.events()]
    assert names.count("t_twice") == 1
    assert names.count("aten::sin") == 2


def test_a_profiler_that_was_started_below_pythons_classes() -> None:
    twice = define_twice()
    # torch has no public way to start one.
    started, options = importlib.import_module("torch.autograd"), importlib.import_module("torch._C._profiler")
    config = started.ProfilerConfig(started.ProfilerState.KINETO, *[False] * 5, options._ExperimentalConfig())
    wanted = {started.ProfilerActivity.CPU}
    started._prepare_profiler(config, wanted)
    started._enable_profiler(config, wanted)
    try:
        twice(torch.sin, X)
    finally:
        found = started._disable_profiler()
    names = [event.name() for event in found.events()]
    assert (names.count("t_twice"), names.count("aten::sin")) == (1, 2)


def test_a_flop_counter_sees_the_inside() -> None:
    for run in both(define_twice(), lambda y: y @ W):
        with FlopCounterMode(display=False) as counter:
            run(X)
        assert counter.get_total_flops() == 2 * 2 * 27


def test_saved_tensor_hooks_see_the_inside() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    w = W.clone().requires_grad_()
    for run in both(define_twice(), lambda y: y * w):
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            (slope,) = torch.autograd.grad(run(X).sum(), w)
        assert packed
        same(slope, 2 * X * W)


def test_a_recorder_in_one_thread_is_none_of_the_others() -> None:
    twice = define_twice()
    results: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: results.append(twice(torch.sin, W)))
        thread.start()
        thread.join()
        return twice(torch.sin, x)

    graph = record(run, X)
    assert nodes(graph, twice) == 1
    same(results, [W.sin().sin()])


def test_an_error_in_a_subgraph_leaves_nothing_behind() -> None:
    twice = define_twice()

    def broken(y: Tensor) -> Tensor:
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        record(lambda x: twice(broken, x), X)
    with contextlib.suppress(ArithmeticError):
        make_fx(torch.func.functionalize(lambda x: twice(broken, x)))(X)
    same(twice(torch.sin, X), X.sin().sin())
    assert nodes(record(lambda x: twice(torch.sin, x), X), twice) == 1
    same(torch.vmap(lambda x: plainly(lambda: twice(torch.sin, x)))(X), X.sin().sin())
