"""``while_loop`` and ``fori_loop``: one graph, however often it runs."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hopkit_controlflow import fori_loop, while_loop
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hopkit import Op

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own use

X = torch.linspace(0.2, 1.4, 6).reshape(2, 3)
W = torch.linspace(1.1, 1.5, 3)

Function = Callable[..., Any]


def grown(x: Tensor, w: Tensor = W, most: float = 30.0) -> Tensor:
    return while_loop(lambda n, x: x.sum() < most, lambda n, x: (n + 1, x * w + n), (torch.tensor(0), x))[1]


def plain(x: Tensor, w: Tensor = W, most: float = 30.0) -> Tensor:
    n = 0
    while x.sum() < most:
        x, n = x * w + n, n + 1
    return x * 1


def nodes(graph: torch.fx.GraphModule, op: Op[..., object] = while_loop) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=op.operator))


def size(graph: torch.fx.GraphModule) -> int:
    return sum(len(m.graph.nodes) for m in graph.modules() if isinstance(m, torch.fx.GraphModule))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_recorded_it_runs_as_often_as_the_values_of_the_day_say(mode: Any) -> None:
    graph = make_fx(lambda x: grown(x), tracing_mode=mode)(X)
    assert nodes(graph) == 1
    for x in (X, X / 10, X + 9):
        assert_close(graph(x), plain(x))
    assert mode != "symbolic" or assert_close(graph(torch.ones(5, 3)), plain(torch.ones(5, 3))) is None


def test_a_graph_does_not_grow_with_the_number_of_trips() -> None:
    def run(trips: int) -> int:
        def step(x: Tensor) -> Any:
            y = fori_loop(0, trips, lambda i, x: x.sin() * W + i, x)
            return torch.autograd.grad(y.sum(), x)

        return size(make_fx(step)(X.clone().requires_grad_()))

    assert run(2) == run(2000)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_gradients_of_the_state_and_of_captures(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(grown, backend=backend, fullgraph=True)
    for by in (1.0, 0.1, 100.0):
        (x, w), (y, v) = (((X * by).requires_grad_(), W.clone().requires_grad_()) for _ in range(2))
        compiled(x, w).cos().sum().backward()
        plain(y, v).cos().sum().backward()
        assert_close(x.grad, y.grad)
        assert_close(w.grad, torch.zeros_like(v) if v.grad is None else v.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_saved_and_loaded(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, most: Tensor) -> Tensor:
            return while_loop(lambda x: x.sum() < most, lambda x: (x * W,), (x,))[0]

    sizes: Any = {"x": {0: torch.export.Dim.DYNAMIC}, "most": None}
    program = torch.export.export(Model(), (X, torch.tensor(30.0)), strict=strict, dynamic_shapes=sizes)
    assert nodes(program.graph_module) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x, most in ((X, 30.0), (X, 100.0), (torch.ones(7, 3), 0.0)):
        want = x * 1
        while want.sum() < most:
            want = want * W
        assert_close(loaded(x, torch.tensor(most)), want)


BATCHES: dict[str, Function] = {
    "vmap": vmap,
    "of grad": lambda f: vmap(grad(lambda x: f(x).sum())),
    "grad of": lambda f: grad(lambda x: vmap(f)(x).sin().sum()),
    "jvp": lambda f: lambda x: jvp(vmap(f), (x,), (x.cos(),)),
    "jacrev": lambda f: vmap(jacrev(f)),
    "of vmap": lambda f: lambda x: vmap(vmap(f))(torch.stack([x, x / 3])),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("how", ["eager", "make_fx", "compile"])
def test_every_item_of_a_batch_stops_for_itself(name: str, how: str) -> None:
    torch.compiler.reset()
    batch, others = torch.stack([X, X / 10, X + 30]), torch.stack([X + 30, X, X])
    function = run = BATCHES[name](grown)
    if how == "make_fx":
        run = make_fx(lambda x: function(x))(batch)
        assert nodes(run) > 0
    if how == "compile":
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    for x in (batch, others):
        if name == "vmap":
            want: Any = torch.stack(list(map(plain, x)))
        elif name == "of vmap":
            want = torch.stack([torch.stack(list(map(plain, part))) for part in (x, x / 3)])
        elif name == "grad of":
            want = grad(lambda x: torch.stack(list(map(plain, x))).sin().sum())(x)
        elif name == "of grad":
            want = torch.stack([grad(lambda x: plain(x).sum())(item) for item in x])
        elif name == "jvp":
            want = tuple(torch.stack(t) for t in zip(*(jvp(plain, (i,), (i.cos(),)) for i in x), strict=True))
        else:
            want = torch.stack([jacrev(plain)(item) for item in x])
        assert_close(run(x), want)


def test_a_state_that_becomes_batched_on_the_way() -> None:
    def run(w: Tensor) -> Tensor:
        return while_loop(lambda x: x.sum() < 9, lambda x: (x * w,), (torch.ones(3),))[0]

    w = torch.tensor([2.0, 4.0, 1.5])
    want = torch.stack([plain_power(float(v)) for v in w])
    assert_close(vmap(run)(w), want)
    assert_close(make_fx(lambda w: vmap(run)(w))(w + 1)(w), want)


def plain_power(w: float) -> Tensor:
    x = torch.ones(3)
    while x.sum() < 9:
        x = x * w
    return x


def test_second_derivatives_recorded() -> None:
    def derived(function: Function) -> Function:
        def step(x: Tensor, w: Tensor) -> Any:
            first = torch.autograd.grad(function(x, w).cos().sum(), (x, w), create_graph=True)
            return first, torch.autograd.grad(first[0].sin().sum() + first[1].sin().sum(), (x, w))

        return step

    graph = make_fx(derived(grown))(X.clone().requires_grad_(), W.clone().requires_grad_())
    assert nodes(graph) == 4
    for by in (1.0, 0.3):
        x, w = (X * by).requires_grad_(), W.clone().requires_grad_()
        assert_close(graph(x, w), derived(plain)(x, w))


def test_what_comes_out_of_no_trips_is_not_what_went_in() -> None:
    x = X.clone()
    for run in (lambda x: fori_loop(0, 0, lambda i, x: x + 1, x), lambda x: grown(x, most=-1.0)):
        y = run(x)
        assert_close(y, x)
        y.zero_()
        assert_close(x, X)


@pytest.mark.parametrize(("lower", "upper"), [(0, 4), (2, 5), (-3, -1), (4, 4), (5, -2)])
@pytest.mark.parametrize("of", [int, torch.tensor, lambda i: torch.tensor([i], dtype=torch.int32)])
def test_bounds(lower: int, upper: int, of: Function) -> None:
    want = X * 1
    for i in range(lower, upper):
        want = want * W + i

    def run(x: Tensor) -> Tensor:
        return fori_loop(of(lower), of(upper), lambda i, x: x * W + i, x)

    assert_close(run(X), want)
    assert_close(make_fx(lambda x: run(x))(X)(X), want)


def test_bounds_that_are_sizes_or_known_only_when_it_runs() -> None:
    def run(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        upper: Any = n.item()
        return fori_loop(0, x.shape[0], lambda i, x: x + i, x), fori_loop(0, upper, lambda i, x: x + i, x)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
            return run(x, n)

    program = torch.export.export(
        Model(), (X, torch.tensor(2)), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}, "n": None}
    )
    x = torch.ones(5, 3)
    for n in (0, 2, 6):
        want = (x + 10, x + sum(range(n)))
        assert_close(run(x, torch.tensor(n)), want)
        assert_close(program.module()(x, torch.tensor(n)), want)


def test_every_item_has_its_bounds() -> None:
    upper = torch.tensor([0, 3, 1])
    run = vmap(lambda n, x: fori_loop(0, n, lambda i, x: x * 2 + i, x))
    want = torch.stack([fori_loop(0, int(n), lambda i, x: x * 2 + i, X) for n in upper])
    batch = torch.stack([X] * 3)
    assert_close(run(upper, batch), want)
    assert_close(make_fx(lambda n, x: run(n, x))(upper + 1, batch)(upper, batch), want)


def test_numbers_in_a_state() -> None:
    def run(x: Tensor) -> object:
        n, y = while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, x * 2), (0, x))
        return n, y

    want = (torch.tensor(3), X * 8)
    assert_close(run(X), want)
    assert_close(make_fx(lambda x: run(x))(X)(X), want)
    assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(X), want)


def test_floating_point_operations_of_every_trip() -> None:
    square = torch.eye(4)
    with FlopCounterMode(display=False) as counted:
        fori_loop(0, torch.tensor(5), lambda i, x: x @ square, square)
    assert counted.get_total_flops() == 5 * 2 * 4**3


def test_as_torch_has_it() -> None:
    torch.compiler.reset()
    arguments: Any = (
        lambda s, x: s["n"] < 4,
        lambda s, x: ({"n": s["n"] + 1, "y": s["y"] + x}, x * W),
        ({"n": torch.tensor(0), "y": X.clone()}, X + 1),
    )
    assert_close(while_loop(*arguments), torch.while_loop(*arguments))


def test_within_each_other() -> None:
    def run(x: Tensor) -> Tensor:
        return fori_loop(0, 3, lambda i, x: grown(x, most=float(40)) / (i + 2), x)

    want = X
    for i in range(3):
        want = plain(want, most=40.0) / (i + 2)
    graph = make_fx(lambda x: run(x))(X + 1)
    assert size(graph) < 40
    assert_close([run(X), graph(X)], [want] * 2)
    assert_close(vmap(run)(torch.stack([X, X + 1]))[0], want)
