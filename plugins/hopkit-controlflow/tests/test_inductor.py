"""What Inductor makes of control flow: its own branches and loops, forward and in training, and no call of Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hopkit_controlflow import cond, fori_loop, map, scan, switch, while_loop
from torch import Tensor
from torch.testing import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's own use
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
]

X = torch.linspace(0.2, 1.4, 6, dtype=torch.float64).reshape(2, 3)
W = torch.linspace(1.1, 1.5, 3, dtype=torch.float64)
LONG = torch.linspace(-1, 1, 900, dtype=torch.float64).reshape(300, 3)

Function = Callable[..., Any]


def chosen(x: Tensor, w: Tensor) -> Any:
    return cond(x.sum() > 0, lambda x: {"y": x * w, "z": (x.T @ x,)}, lambda x: {"y": x, "z": (w.outer(w),)}, (x,))["y"]


def within(x: Tensor, w: Tensor) -> Any:
    """A weight that only an inner function closes over."""
    return cond(x.sum() > 0, lambda x: switch(x.sum() > 5, (torch.sin, lambda x: x * w), x), torch.cos, (x,))


def grown(x: Tensor, w: Tensor) -> Any:
    return while_loop(lambda n, x: x.sum() < 30, lambda n, x: [n + 1, x * w + n], [torch.tensor(0), x])[1]


def counted(x: Tensor, w: Tensor) -> Any:
    return fori_loop(0, x.sum().long(), lambda i, s: (s[1], s[0] * w / 2 + i), (x, x + 1))[0]


def nested(x: Tensor, w: Tensor) -> Any:
    return while_loop(
        lambda x: x.sum() < 30, lambda x: (cond(x.sum() > 9, lambda x: x * w, lambda x: x + w, (x,)),), (x,)
    )[0]


def swept(x: Tensor, w: Tensor) -> Any:
    rows = x.sum().sin() * LONG

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        c = (c * w / 2).sin() + x
        return c, {"one": c * x, "all": x.sum()}

    c, y = scan(step, torch.zeros_like(w), rows, reverse=True)
    return y["one"].sum(0) * c + y["all"].cos().sum()


def mapped(x: Tensor, w: Tensor) -> Any:
    return map(lambda row: (row * w).sin() + row, x.sum().sin() * LONG)


WAYS = (X, X / 100, X + 100, -X)


def compared(function: Function, x: Tensor, w: Tensor, training: bool) -> tuple[Any, ...]:
    if not training:
        return (function(x, w),)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = function(x, w)
    return y, *torch.autograd.grad(y.cos().sum(), (x, w), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(
    ("function", "training"),
    [
        *((function, True) for function in (chosen, within, grown, counted, nested, swept, mapped)),
        *((function, False) for function in (chosen, nested, swept)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_nothing_is_called_back(function: Function, training: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    compared(compiled, X, W, training)
    with torch.profiler.profile() as profile:
        compared(compiled, X, W, training)
    assert not any(event.key.startswith("hopkit") for event in profile.key_averages())
    for x in WAYS:
        assert_close(compared(compiled, x, W, training), compared(function, x, W, training))


@pytest.mark.parametrize("function", [chosen, swept], ids=lambda f: f.__name__)
def test_second_derivatives(function: Function) -> None:
    def slope(x: Tensor) -> Any:
        return torch.func.grad(lambda x: function(x, W).sin().sum())(x).square().sum()

    torch.compiler.reset()
    for x in (X, X / 10):
        assert_close(torch.compile(torch.func.grad(slope), fullgraph=True)(x), torch.func.grad(slope)(x))


@pytest.mark.parametrize("function", [chosen, grown, swept], ids=lambda f: f.__name__)
def test_sizes_that_change(function: Function) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for size in (2, 5):
        x = torch.linspace(0.2, 1.4, 3 * size, dtype=torch.float64).reshape(size, 3)
        assert_close(compared(compiled, x, W, training=True), compared(function, x, W, training=True))


def test_a_package_decides_and_loops(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return chosen(x, W) + grown(x, W) + mapped(x, W).sum()

    from torch._inductor import aoti_compile_and_package, aoti_load_package  # loads torch's compiler

    program = torch.export.export(Model(), (X,))
    path = aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    packaged = aoti_load_package(path)
    for x in WAYS:
        assert_close(packaged(x), Model()(x))
