"""Threads, processes and faults: registries stay consistent, and whoever raises leaves torch as it was."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from functorch.compile import aot_function, nop  # type: ignore[import-untyped] # torch's own
from torch import Tensor

import hopkit
from hopkit import Op, Subgraph
from hopkit._torch.fakes import FakeMode
from hopkit._torch.snapshot import nothing
from hopkit.extend import OpSpec, Rule, hookimpl
from hopkit.extend.mode import Mode, TorchDispatchMode
from hopkit.kit import Kit, fresh
from tests.recording import define_once, define_twice, nodes, record, same

X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
THREADS = 8

TRACING = threading.Lock()
"""torch.fx traces in one thread at a time: it patches ``torch.nn.Module`` for all."""

JIT = "ignore:`torch.jit.script"  # torch's own decompositions


def together(*work: Callable[[int], object]) -> list[object]:
    """What every function gives, each in threads of its own that start at the same moment."""
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> object:
        barrier.wait(30)
        return work[number % len(work)](number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


# Threads


def test_ops_defined_and_called_by_many_threads(hopkit_fresh: Kit) -> None:
    def work(thread: int) -> list[Op[..., Tensor]]:
        made = []
        for number in range(20):

            @hopkit.define(f"t_thread_{thread}_{number}")
            def op(body: Subgraph, x: Tensor) -> Tensor:
                return body(body(x)) * thread  # called before the next round

            leaf = X.clone().requires_grad_()
            op(torch.sin, leaf).sum().backward()
            assert leaf.grad is not None
            same(leaf.grad, thread * X.sin().cos() * X.cos())
            made.append(op)
        return made

    made = [op for ops in together(work) for op in ops]  # type: ignore[attr-defined] # lists of ops
    assert {op.spec.name: op for op in made} == hopkit.ops()
    assert all(getattr(torch.ops.higher_order, op.spec.name) is op.operator for op in made)
    same(made[-1](torch.sin, X), X.sin().sin() * (THREADS - 1))


def test_one_op_recorded_by_many_threads(hopkit_fresh: Kit) -> None:
    op = define_twice()

    def work(thread: int) -> None:
        for number in range(5):
            w = torch.full((3,), float(thread + number), requires_grad=True)
            with TRACING:
                graph = record(lambda x: op(lambda y: y * w, x), X)  # noqa: B023 # called before the next round
            assert nodes(graph, op) == 1
            same(graph(X), X * w * w)
            same(torch.vmap(lambda x: op(lambda y: y * w, x))(X), X * w * w)  # noqa: B023 # the same

    with nothing():
        together(work)


def test_one_name_is_won_by_one_thread(hopkit_fresh: Kit) -> None:
    def work(thread: int) -> str:
        try:
            define_once()
        except hopkit.DuplicateOpError:
            return "lost"
        return "won"

    for _ in range(20):
        assert sorted(map(str, together(work))) == ["lost"] * (THREADS - 1) + ["won"]
        hopkit.undefine(hopkit.ops()["t_once"])


def test_installed_plugins_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    @hookimpl
    def hopkit_op_defined(op: OpSpec) -> None:
        """Listens."""

    class Entry:
        name, module, group, value, dist = "t_slow", "t_slow", "hopkit", "t_slow", None

        def load(self) -> object:
            loaded.append(threading.get_ident())
            threading.Event().wait(0.05)
            return SimpleNamespace(hopkit_op_defined=hopkit_op_defined)

    with fresh() as kit:
        monkeypatch.setattr(kit, "_entries", {"t_slow": Entry()})
        op = define_once()
        results = together(lambda _: op(torch.sin, X))
    assert len(loaded) == 1
    same(results, [X.sin()] * THREADS)


def test_a_plugin_comes_and_goes_while_other_threads_call(hopkit_fresh: Kit) -> None:
    op = define_twice()
    want = X.sin().sin()
    stop = threading.Event()

    @hookimpl
    def hopkit_device_rule(op: OpSpec) -> Rule:
        return lambda body, x, *, scale: body(body(x)) * scale

    @hookimpl
    def hopkit_fake_rule(op: OpSpec) -> Rule:
        return lambda body, x, *, scale: torch.empty_like(x)

    @hookimpl
    def hopkit_add_modes() -> list[Mode]:
        return [Mode("t_log", Log, gives="what the test says")]

    @hookimpl
    def hopkit_t_log_rule(op: OpSpec) -> Rule:
        return lambda entry, call: call()

    hooks = (hopkit_device_rule, hopkit_fake_rule, hopkit_add_modes, hopkit_t_log_rule)
    plugin = SimpleNamespace(**{hook.__name__: hook for hook in hooks})

    def calls(thread: int) -> None:
        while not stop.is_set():
            same(op(torch.sin, X), want)
            with Log():  # type: ignore[no-untyped-call] # torch's own
                same(op(torch.sin, X), want)
            leaf = X.clone().requires_grad_()
            same(torch.autograd.grad(op(torch.sin, leaf).sum(), leaf), (X.sin().cos() * X.cos(),))
            if thread % 3 == 0:
                with TRACING:
                    graph = record(lambda x: op(torch.sin, x), X)
                same(graph(X), want)

    def comes_and_goes(_: int) -> None:
        try:
            for _ in range(25):
                hopkit.register(plugin, "t_comes_and_goes")
                hopkit.unregister(plugin)
        finally:
            stop.set()

    together(lambda thread: comes_and_goes(thread) if thread == 0 else calls(thread))
    assert "t_comes_and_goes" not in {info.name for info in hopkit.plugins()}
    same(op(torch.sin, X), want)


# Faults


class Fault(Exception):
    """What a rule raises."""


def _like(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.empty_like(x)


def fail(*args: object, **kwargs: object) -> object:
    raise Fault


class Failing:
    """A derivative that cannot be had."""

    @staticmethod
    def forward(body: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, object]:
        return body(x), x

    @staticmethod
    def backward(saved: object, gradient: Tensor) -> object:
        raise Fault


class Log(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        return func(*args, **(kwargs or {}))


def leaf() -> Tensor:
    return X.clone().requires_grad_()


Called = Callable[[Tensor], Any]


def _fake(call: Called) -> object:
    with FakeMode() as mode:
        return call(mode.from_tensor(X))


def _log(call: Called) -> object:
    with Log():  # type: ignore[no-untyped-call] # torch's own
        return call(X)


def _grad(call: Called) -> object:
    return record(_slope(call), X)


def _slope(call: Called) -> Called:
    slope: Called = torch.func.grad(lambda x: call(x).sum())
    return slope


def _ahead(call: Called) -> object:
    compiled: Called = aot_function(call, fw_compiler=nop)
    return compiled(leaf()).sum().backward()


FAULTS: dict[str, tuple[str, object, Callable[[Called], object]]] = {
    "device": ("device", fail, lambda call: call(X)),
    "device below autograd": ("device", fail, lambda call: call(leaf())),
    "autograd forward": ("autograd", fail, lambda call: call(leaf())),
    "autograd backward": ("autograd", Failing, lambda call: call(leaf()).sum().backward()),
    "autograd backward, recorded": (
        "autograd",
        Failing,
        lambda call: record(lambda x: torch.autograd.grad(call(x).sum(), x), leaf()),
    ),
    "autograd, torch.func": ("autograd", fail, lambda call: _slope(call)(X)),
    "fake": ("fake", fail, _fake),
    "fake, recorded": ("fake", fail, lambda call: record(call, X, mode="fake")),
    "functionalize": ("functionalize", fail, lambda call: record(torch.func.functionalize(call), X)),
    "proxy": ("proxy", fail, lambda call: record(call, X)),
    "proxy, symbolic": ("proxy", fail, lambda call: record(call, X, mode="symbolic")),
    "proxy, in training": (
        "proxy",
        fail,
        lambda call: record(lambda x: torch.autograd.grad(call(x).sum(), x), leaf()),
    ),
    "vmap": ("vmap", fail, lambda call: torch.vmap(call)(X)),
    "vmap, recorded": ("vmap", fail, lambda call: record(torch.vmap(torch.vmap(call)), X)),
    "jvp": ("jvp", fail, lambda call: torch.func.jvp(call, (X,), (X,))),
    "jvp, recorded": ("jvp", fail, lambda call: record(lambda x: torch.func.jvp(call, (x,), (x,)), X)),
    "dynamo": ("dynamo", fail, lambda call: torch.compile(call, backend="eager")(X)),
    "ahead": ("proxy", fail, _ahead),
    "inductor": ("inductor", fail, lambda call: torch.compile(call)(X)),
    "a plugin's mode": ("t_log", fail, _log),
}


class Bringing:
    """A plugin that brings a mode."""

    @hookimpl
    def hopkit_add_modes(self) -> list[Mode]:
        return [Mode("t_log", Log, gives="what the test says")]

    @hookimpl
    def hopkit_t_log_rule(self, op: OpSpec) -> Rule:
        return lambda entry, call: call()


@pytest.mark.filterwarnings(JIT, "ignore:Please add support for subgraph args:UserWarning")  # of any node kept
@pytest.mark.parametrize("where", FAULTS)
def test_a_rule_that_raises_leaves_torch_as_it_was(where: str, hopkit_fresh: Kit) -> None:
    mode, rule, run = FAULTS[where]
    hopkit.register(Bringing())

    def define(name: str) -> Op[..., Tensor]:
        @hopkit.define(name)
        def op(body: Subgraph, x: Tensor) -> Tensor:
            return body(x) + x

        return op

    faulty, sound = define("t_faulty"), define("t_sound")
    faulty.rule(mode)(rule)
    if mode == "device":
        faulty.rule("fake")(_like)
    with nothing(), pytest.raises(Exception) as caught:  # noqa: PT011 # torch's compiler wraps what is raised
        run(lambda x: faulty(torch.sin, x))
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, Fault):
        error = error.__cause__ or error.__context__
    assert isinstance(error, Fault) or "Fault" in str(caught.value)
    with nothing():
        if where != "inductor":  # it would run a C++ compiler
            run(lambda x: sound(torch.sin, x))  # what raised is in nobody's cache
        same(sound(torch.sin, X), X.sin() + X)


@pytest.mark.filterwarnings(JIT)
def test_a_subgraph_that_raises_leaves_torch_as_it_was(hopkit_fresh: Kit) -> None:
    op = define_once()

    def body(x: Tensor) -> Tensor:
        with torch.no_grad():
            raise Fault

    runs: list[Callable[[Called], object]] = [
        lambda f: f(X),
        lambda f: record(f, X),
        lambda f: record(f, X, mode="symbolic"),
        lambda f: record(torch.vmap(f), X),
        lambda f: record(lambda x: torch.func.jvp(f, (x,), (x,)), X),
        lambda f: record(torch.func.functionalize(f), X),
        _grad,
        _fake,
        _ahead,
    ]
    for run in runs:
        with nothing(), pytest.raises(Fault):
            run(lambda x: op(body, x))


# Processes


def _in_a_child(seed: float, differentiates: bool) -> list[float]:
    if "t_once" not in hopkit.ops():
        define_once()
    op = hopkit.ops()["t_once"]
    leaf = torch.full((2,), seed, requires_grad=True)
    graph = record(lambda x: op(torch.sin, x), leaf.detach())
    assert nodes(graph, op) == 1
    if not differentiates:
        return list((graph(leaf) + cast("Tensor", op(torch.sin, leaf))).tolist())
    total: Tensor = graph(leaf).sum() + cast("Tensor", op(torch.sin, leaf)).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return list(gradient.tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_an_op_called_in_a_child_process(method: str, hopkit_fresh: Kit) -> None:
    define_once()
    record(lambda x: hopkit.ops()["t_once"](torch.sin, x), X)
    with multiprocessing.get_context(method).Pool(1) as pool:
        # A forked process has no threads of autograd.
        got = pool.apply(_in_a_child, (0.5, method == "spawn"))
    value = torch.full((2,), 0.5)
    same(torch.tensor(got), 2 * (value.cos() if method == "spawn" else value.sin()))
