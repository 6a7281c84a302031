"""``abstract=``: what stands for a body where there are no values; and what such bodies are given to work with."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, vmap

import hopkit
from hopkit import Op, SpecError, Subgraph
from hopkit._torch.inductor import written
from hopkit.extend import body as bodies
from tests.recording import nodes, record, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's, of its own code
]

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
W = torch.linspace(0.5, 1.5, 4)


def _either(use: Tensor, yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
    return torch.empty_like(yes(x) + no(x))


def define_branch() -> Op[..., Tensor]:
    @hopkit.define("t_branch", abstract=_either)
    def branch(use: Tensor, yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
        return yes(x) if use > 0 else no(x)

    return branch


def define_steps() -> Op[..., Tensor]:
    @hopkit.define("t_steps", abstract=lambda body, x, n: torch.empty_like(body(x)))
    def steps(body: Subgraph, x: Tensor, n: int) -> Tensor:
        for _ in range(n):
            x = body(x)
        return x

    return steps


def test_it_says_what_subgraphs_are_called_with_and_what_comes_out() -> None:
    branch, w = define_branch(), W.clone().requires_grad_()
    graph = record(trained(lambda use, x, w: branch(use, lambda y: y * w, torch.cos, x)), torch.tensor(1.0), X, w)
    assert nodes(graph, branch) == 2
    for use in (1.0, -1.0):
        value, (slope,) = graph(torch.tensor(use), X, w)
        same(value, X * W if use > 0 else X.cos())
        weights = torch.linspace(0.5, 1.5, 12).reshape(3, 4)
        same(slope, (X * weights).sum(0) if use > 0 else torch.zeros(4))


def test_it_runs_each_subgraph_once_per_recording() -> None:
    branch, runs = define_branch(), list[int]()

    def noted(y: Tensor) -> Tensor:
        runs.append(1)
        return y.sin()

    def within(y: Tensor) -> Tensor:
        return branch(torch.tensor(1.0), noted, torch.cos, y)

    record(lambda x: branch(x.sum(), within, torch.cos, x), X)
    assert len(runs) < 9


@pytest.mark.filterwarnings("error::hopkit.HopkitWarning")
def test_under_autocast_with_gradients_it_is_still_one_node() -> None:
    branch, w = define_branch(), torch.eye(4).requires_grad_()

    def run(use: Tensor, x: Tensor) -> Tensor:
        return branch(use, lambda y: y @ w, torch.cos, x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = record(run, torch.tensor(1.0), X)
        assert nodes(graph, branch) == 1
        want = run(torch.tensor(1.0), X)
    assert want.dtype is torch.bfloat16
    same(graph(torch.tensor(1.0), X), want)


def test_it_is_given_alone() -> None:
    keywords: list[dict[str, Any]] = [{"inputs": lambda f, x: ((x,),)}, {"outputs": lambda f, x: x}]
    for more in keywords:
        with pytest.raises(SpecError, match=r"`inputs=` or `outputs=` was given, too.*Give `abstract` alone"):

            @hopkit.define("t_both", abstract=lambda f, x: f(x), **more)
            def both(f: Subgraph, x: Tensor) -> Tensor:
                return f(x)

    with pytest.raises(SpecError, match="does not take the body's arguments"):

        @hopkit.define("t_other", abstract=lambda f: f)
        def other(f: Subgraph, x: Tensor) -> Tensor:
            return f(x)


def wave(y: Tensor) -> Tensor:
    return y.sin() * W


def test_inductor_fuses_a_short_loop_and_calls_a_long_one_back() -> None:
    steps, found = define_steps(), dict[int, bool]()
    for n in (3, 300):
        torch.compiler.reset()
        run = functools.partial(steps, wave, n=n)
        result, code = written(torch.compile(run, fullgraph=True), X)
        want = X
        for _ in range(n):
            want = want.sin() * W
        same(result, want)
        found[n] = "hopkit.call" in code
    assert found == {3: False, 300: True}


def test_anywhere_of_a_batch_and_elsewhere() -> None:
    seen = list[bool]()

    def look(t: Tensor) -> Tensor:
        seen.append(hopkit.anywhere(t > 2))
        return t

    vmap(look)(torch.tensor([1.0, 3.0]))
    vmap(look)(torch.tensor([1.0, 2.0]))
    vmap(vmap(look))(torch.tensor([[1.0], [3.0]]))
    look(torch.tensor(3.0))
    look(torch.tensor([1.0]))
    assert seen == [True, False, True, True, False]
    assert hopkit.anywhere(1)
    assert not hopkit.anywhere(False)


def test_own_copies_what_belongs_to_others() -> None:
    x = X.clone()
    fresh = x + 1
    result: Any = bodies.own(
        {"view": x[0], "itself": x, "mine": fresh, "again": fresh, "turned": fresh.t(), "n": 3}, [x]
    )
    assert result["mine"] is fresh
    assert result["n"] == 3
    assert result["turned"].is_contiguous()
    for name in ("view", "itself", "again"):
        result[name].zero_()
    same(x, X)
    same(fresh, X + 1)
    same(vmap(lambda t: bodies.own(t.t(), [t]))(torch.stack([X, X])), torch.stack([X.t(), X.t()]))


def test_writes_are_seen_through_transforms() -> None:
    found = list[bool]()

    def write(t: Tensor) -> Tensor:
        before = bodies.versions([t])
        t.add_(1)
        found.append(bodies.versions([t]) != before)
        return t

    write(X.clone())
    vmap(write)(X.clone())
    torch.func.vjp(lambda t: write(t * 1), X)
    with torch.inference_mode():
        assert bodies.versions([X.clone(), 3]) == [0]
    assert found == [True] * 3


def test_on_stand_ins_nothing_is_computed() -> None:
    torch.manual_seed(0)
    want, w = torch.rand(1), W.clone()
    torch.manual_seed(0)
    shape = bodies.on_stand_ins(lambda: (w.add_(1) * torch.rand(3, 4)).sum(0).shape)
    assert shape == (4,)
    same(torch.rand(1), want)
    same(w, W)
    with pytest.raises(ValueError, match="mine"):
        bodies.on_stand_ins(_failing)


def _failing() -> None:
    raise ValueError("mine")


def test_a_recorded_subgraph_is_known_as_one() -> None:
    seen = list[bool]()

    @hopkit.define("t_asked", abstract=lambda f, x: torch.empty_like(f(x)))
    def asked(f: Subgraph, x: Tensor) -> Tensor:
        seen.append(bodies.is_recorded(f))
        return f(x)

    asked(torch.sin, X)
    graph = record(lambda x: asked(torch.sin, x), X)
    seen.clear()
    graph(X)
    asked(torch.sin, X)
    assert seen == [True, False]
