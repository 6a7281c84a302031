"""Inductor gets the body, which fuses; or a call of it, or what a plugin makes of the node."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import Op, OpSpec, Subgraph
from hopkit._torch.inductor import written
from hopkit.extend import Call
from hopkit.extend.body import own, sweep
from hopkit.extend.inductor import inline, lowered
from tests.recording import define_once, define_twice, same

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's, of its own code
    pytest.mark.filterwarnings("ignore:Please add support for subgraph args:UserWarning"),  # torch's, of any node kept
]

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
W = torch.linspace(0.5, 1.5, 4)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def kernels(function: Any, *args: Tensor) -> tuple[Any, int]:
    """What the compiled function gives, and how many kernels Inductor wrote for it."""
    torch.compiler.reset()
    result, code = written(torch.compile(function, fullgraph=True), *args)
    return result, len(re.findall(r"async_compile\.(?:cpp_pybinding|triton)\(", code))


def test_the_body_fuses_with_what_stands_around_it() -> None:
    twice = define_twice()

    def body(y: Tensor) -> Tensor:
        return torch.tanh(y * W) + 1

    got, count = kernels(lambda x: twice(body, x.sin()).cos(), X)
    want, inline_count = kernels(lambda x: body(body(x.sin())).cos(), X)
    same(got, want)
    assert count == inline_count == 1


def test_training_is_that_of_the_body() -> None:
    twice, w = define_twice(), W.clone().requires_grad_()
    torch.compile(lambda x: twice(lambda y: torch.tanh(y * w), x), fullgraph=True)(X).square().sum().backward()
    got, w.grad = w.grad, None
    torch.tanh(torch.tanh(X * w) * w).square().sum().backward()
    same(got, w.grad)


def _branch() -> Op[..., Tensor]:
    @hopkit.define("t_branch", inputs=lambda yes, no, x: ((x,), (x,)), outputs=lambda yes, no, x: yes(x))
    def branch(yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
        return yes(x) if x.sum() > 0 else no(x)

    return branch


def test_a_body_that_decides_on_a_value_is_called() -> None:
    branch = _branch()
    run = torch.compile(lambda x: branch(lambda y: y * W, lambda y: y, x) + 1, fullgraph=True)
    for x in (X + 1, X - 1):
        same(run(x), (x * W if x.sum() > 0 else x) + 1)


def test_what_is_called_may_give_one_tensor_twice() -> None:
    """Inductor writes over the memory of a value that is needed no more."""

    @hopkit.define(
        "t_twice", inputs=lambda body, x: ((x,),), outputs=lambda body, x: (torch.empty_like(x), torch.empty_like(x))
    )
    def twice(body: Subgraph, x: Tensor) -> tuple[Tensor, Tensor]:
        y = body(x) if x.isfinite().all() else x
        return y, y.view_as(y)

    def run(x: Tensor, use: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        once, again = use(torch.sin, x)
        first = (once + 1).relu() @ x
        return first, (again * 2) @ first

    def plain(body: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return body(x), body(x)

    x = torch.linspace(-1.0, 1.0, 64).reshape(8, 8)
    same(torch.compile(run, fullgraph=True)(x, twice), run(x, plain))


def test_an_effect_happens_each_time_and_in_order() -> None:
    seen: list[str] = []

    @hopkit.define("t_log", effectful=True)
    def log(body: Subgraph, x: Tensor, *, text: str) -> Tensor:
        seen.append(text)
        return body(x)

    def run(x: Tensor) -> Tensor:
        log(torch.sin, x, text="first")
        log(torch.sin, x, text="second")
        return log(torch.cos, x, text="third")

    compiled = torch.compile(run, fullgraph=True)
    compiled(X)
    seen.clear()
    same(compiled(X), X.cos())
    assert seen == ["first", "second", "third"]


def test_a_kernel_written_by_hand_is_what_inductor_gets() -> None:
    once = define_once()
    asked: list[object] = []

    @once.rule("device", device="cpu")
    def kernel(body: Subgraph, *xs: Tensor) -> Tensor:
        asked.append(body)
        return body(*xs).clone()

    w = W.clone().requires_grad_()
    result = torch.compile(lambda x: once(lambda y: (y * w).sin(), x), fullgraph=True)(X)
    result.sum().backward()
    got, w.grad = w.grad, None
    (X * w).sin().sum().backward()
    same(got, w.grad)
    assert asked


def test_a_plugin_lowers_an_op_itself() -> None:
    once = define_once()
    asked: list[str] = []

    def lower(call: Call) -> object:
        asked.append(call.op.name)
        (result,) = cast("tuple[object]", inline(call))
        return (lowered(torch.ops.aten.mul.Tensor, result, 2.0),)

    @hopkit.hookimpl(op="t_once")
    def hopkit_inductor_rule(op: OpSpec) -> object:
        return lower

    hopkit.register(SimpleNamespace(hopkit_inductor_rule=hopkit_inductor_rule), name="lowering")
    same(torch.compile(lambda x: once(torch.sin, x) + 1, fullgraph=True)(X), X.sin() * 2 + 1)
    assert asked == ["t_once"]


@pytest.mark.parametrize("training", [False, True])
def test_an_outlined_subgraph_is_compiled_once(training: bool) -> None:
    @hopkit.define("t_block", outline=True)
    def block(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 4).requires_grad_(training) for _ in range(4)]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = block(lambda y, layer=layer: torch.tanh(layer(y)), x)
        return x

    def step(function: Any) -> list[Tensor | None]:
        result = function(X)
        if training:
            result.sum().backward()
        slopes = [p.grad for layer in layers for p in layer.parameters()]
        for layer in layers:
            layer.zero_grad()
        return [result.detach(), *slopes]

    want = step(run)
    got, code = written(step, torch.compile(run, fullgraph=True))
    same(got, want)
    assert len(re.findall(r"cpp_pybinding\(", code)) <= (4 if training else 2)  # and not some for each of four layers


def test_code_does_not_grow_with_the_number_of_trips() -> None:
    @hopkit.define("t_total", inputs=lambda step, c, xs: ((c, xs[0]),), outputs=lambda step, c, xs: torch.empty_like(c))
    def total(step: Subgraph, c: Tensor, xs: Tensor) -> Tensor:
        return own(sweep(lambda c, x: (step(c, x), x.sum()), c, xs)[0], [c, xs])

    def run(xs: Tensor) -> Tensor:
        return total(lambda c, x: (c * W / 2).sin() + x, W, xs)

    counts = []
    for length in (300, 3000):
        xs = torch.linspace(-1.0, 1.0, 4 * length).reshape(length, 4)
        got, count = kernels(run, xs)
        same(got, run(xs))
        counts.append(count)
    assert counts[0] == counts[1] < 10
