"""fake: shapes, strides, dtypes and devices without values; bodies that decide on values say theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import Subgraph
from hopkit._torch.fakes import FakeMode
from tests.recording import Function, define_once, define_twice, nodes, record, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)


def define_if() -> hopkit.Op[..., Tensor]:
    @hopkit.define("t_if", inputs=lambda p, a, b, x: ((x,), (x,)), outputs=lambda p, a, b, x: torch.empty_like(x))
    def choose(p: Tensor, a: Subgraph, b: Subgraph, x: Tensor) -> Tensor:
        return a(x) if bool(p > 0) else b(x)

    return choose


def test_strides_dtypes_and_devices() -> None:
    once = define_once()
    bodies: list[Function] = [
        lambda y: y.t() + 1,
        lambda y: y.to(torch.float64),
        lambda y: y.argmax(0),
        lambda y: y[::2, 1:] * 2,
    ]
    for body in bodies:
        want: Any = body(X)
        with FakeMode() as mode:
            got = once(body, mode.from_tensor(X))
        assert (got.shape, got.stride(), got.dtype, got.device) == (want.shape, want.stride(), want.dtype, want.device)


def test_a_recorded_graph_runs_on_fakes() -> None:
    twice = define_twice()
    graph = record(lambda x, w: twice(lambda y: y @ w, x), X, W)
    with FakeMode() as mode:
        got = graph(mode.from_tensor(X), mode.from_tensor(W))
    assert (got.shape, got.device) == (X.shape, X.device)


def test_a_captured_weight_may_be_real() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(lambda y: y @ W, x), X, mode="fake")
    assert nodes(graph, twice) == 1
    same(graph(X), X @ W @ W)


@pytest.mark.parametrize("active", [True, False], ids=["in the mode", "outside the mode"])
def test_a_branch_on_fakes(active: bool) -> None:
    choose, mode = define_if(), FakeMode()
    x = mode.from_tensor(X)
    if active:
        with mode:
            got = choose(x.sum(), torch.sin, torch.cos, x)
    else:
        got = choose(x.sum(), torch.sin, torch.cos, x)
    assert got.shape == X.shape


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_branch_is_recorded_whole(mode: str) -> None:
    choose = define_if()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return choose(x.sum(), lambda y: y @ w, lambda y: y.sin(), x)

    graph = record(run, X, W, mode=mode)  # type: ignore[arg-type] # one of the three
    assert nodes(graph, choose) == 1
    for x in (X, X + 1, X - 1):
        same(graph(x, W), run(x, W))


def test_a_branch_inside_a_subgraph() -> None:
    choose, twice = define_if(), define_twice()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: choose(y.sum(), lambda z: z @ w, lambda z: z.sin(), y), x)

    graph = record(run, X, W)
    assert (nodes(graph, twice), nodes(graph, choose)) == (1, 1)
    for x in (X, X + 1, X - 1):
        same(graph(x, W), run(x, W))


def test_a_loop_is_recorded_whole() -> None:
    @hopkit.define("t_while", inputs=lambda again, step, x: ((x,), (x,)), outputs=lambda again, step, x: x * 1)
    def loop(again: Subgraph, step: Subgraph, x: Tensor) -> Tensor:
        while bool(again(x)):
            x = step(x)
        return x.clone()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return loop(lambda y: y.abs().sum() < 100, lambda y: y * 2 + w[0], x)

    graph = record(run, X, W, mode="symbolic")
    assert nodes(graph, loop) == 1
    for x in (X, X * 7, X * 1000):
        same(graph(x, W), run(x, W))


def test_a_loop_need_not_be_unrolled_to_learn_its_shapes() -> None:
    @hopkit.define("t_long", inputs=lambda step, x, n: ((x,),), outputs=lambda step, x, n: torch.empty_like(x))
    def long(step: Subgraph, x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = step(x)
        return x

    calls: list[int] = []

    def step(y: Tensor) -> Tensor:
        calls.append(1)
        return y * 0.5

    graph = record(lambda x: long(step, x, 1000), X)
    assert len(calls) < 10
    same(graph(X), X * 0)


def test_meta_tensors() -> None:
    twice = define_twice()
    assert twice(torch.sin, X.to("meta")).is_meta
    assert record(lambda x: twice(torch.sin, x), X.to("meta"))(X.to("meta")).is_meta


def test_a_branch_on_meta_tensors() -> None:
    choose = define_if()
    weight = W.to("meta").requires_grad_()
    y = choose(X.to("meta").sum(), lambda z: z @ weight, torch.cos, X.to("meta"))
    y.sum().backward()
    assert (y.shape, y.is_meta) == (X.shape, True)
    assert weight.grad is not None
    assert weight.grad.is_meta


def test_a_branch_on_meta_tensors_that_closes_over_a_real_one() -> None:
    choose, weight = define_if(), W.clone().requires_grad_()
    y = choose(X.to("meta").sum(), lambda z: z @ weight, torch.cos, X.to("meta"))
    assert (y.shape, y.is_meta, y.requires_grad) == (X.shape, True, True)
