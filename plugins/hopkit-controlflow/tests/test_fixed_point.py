"""``fixed_point``: the derivatives of the unrolled loop, of which nothing is kept; and loops that do not end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hopkit_controlflow
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's, where it loads forward mode
    pytest.mark.filterwarnings("ignore:Error detected in"),
]

fixed_point: Any = hopkit_controlflow.fixed_point
grad: Any = torch.func.grad
jvp: Any = torch.func.jvp
vmap: Any = torch.vmap

W = torch.tensor([[0.2, 0.1], [-0.1, 0.3]], dtype=torch.float64)
B = torch.linspace(0.5, 1, 2, dtype=torch.float64)
TANGENTS = W.cos(), B.sin()

Function = Callable[..., Any]


def unrolled(w: Tensor, b: Tensor) -> Any:
    x = torch.zeros_like(b)
    for _ in range(60):
        x = torch.tanh(w @ x + b)
    return x


def solved(w: Tensor, b: Tensor) -> Any:
    return fixed_point(lambda x: torch.tanh(w @ x + b), torch.zeros_like(b), tolerance=1e-14)[0]


def tape(function: Function) -> Any:
    def run(w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        sources = w.detach().requires_grad_(), b.detach().requires_grad_()
        return torch.autograd.grad(function(*sources).square().sum(), sources)

    return run


def both(function: Function) -> Any:
    return grad(lambda w, b: function(w, b).square().sum(), argnums=(0, 1))


def second(function: Function) -> Any:
    return both(lambda w, b: torch.cat([t.reshape(-1) for t in both(function)(w, b)]))


def batch(run: Function) -> Any:
    return lambda w, b: run(torch.stack([w, w / 2]), torch.stack([b, b + 1]))


MODES: dict[str, Function] = {
    "tape": tape,
    "grad": both,
    "second": second,
    "third": lambda f: both(lambda w, b: torch.cat([t.reshape(-1) for t in second(f)(w, b)])),
    "jvp": lambda f: lambda w, b: jvp(f, (w, b), TANGENTS),
    "jvp of jvp": lambda f: lambda w, b: jvp(lambda w, b: jvp(f, (w, b), TANGENTS)[1], (w, b), TANGENTS),
    "jvp of grad": lambda f: lambda w, b: jvp(both(f), (w, b), TANGENTS),
    "vmap": lambda f: batch(vmap(f)),
    "tape of vmap": lambda f: batch(tape(vmap(f))),
    "vmap of second": lambda f: batch(vmap(second(f))),
    "make_fx": lambda f: lambda w, b: make_fx(tape(f))(w, b + 1)(w, b),
    "make_fx of second": lambda f: lambda w, b: make_fx(second(f))(w, b + 1)(w, b),
    "recorded first": lambda f: lambda w, b: tape(make_fx(f)(w, b + 1))(w, b),
    "aot_eager": lambda f: tape(torch.compile(f, backend="aot_eager", fullgraph=True)),
    "inductor": lambda f: tape(torch.compile(f, fullgraph=True)),
    "compiled vmap": lambda f: torch.compile(batch(vmap(f)), backend="aot_eager"),
}
PLAIN = dict.fromkeys(["aot_eager", "inductor", "make_fx", "recorded first"], "tape") | {"compiled vmap": "vmap"}


@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_unrolled_loop(mode: str) -> None:
    torch.testing.assert_close(MODES[mode](solved)(W, B), MODES[PLAIN.get(mode, mode)](unrolled)(W, B))


def test_nothing_of_the_loop_is_kept() -> None:
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        solved(W.clone().requires_grad_(), B)
    assert len(kept) < 10


def test_where_it_begins_has_no_derivative() -> None:
    init = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x, _ = fixed_point(lambda x: x / 2 + B, init)
    (gradient,) = torch.autograd.grad(x.sum(), init)
    assert torch.equal(gradient, torch.zeros_like(init))


ENDLESS: dict[str, tuple[Function, int, list[float]]] = {
    "swings": (lambda x: -x, 100, [1.0, 2.0]),
    "grows": (lambda x: x * 1e10, 1, [1e10, 2e10]),
    "is no number": (lambda x: x * torch.nan, 0, [1.0, 2.0]),
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("mode", ["eager", "make_fx", "aot_eager", "inductor", "vmap"])
def test_no_convergence_is_a_status(kind: str, mode: str) -> None:
    step, steps, last = ENDLESS[kind]

    def function(init: Tensor) -> Any:
        return fixed_point(step, init)

    def mapped(init: Tensor) -> Any:
        x, status = vmap(function)(init[None])
        return x[0], type(status)(*(t[0] for t in status))

    runs: dict[str, Any] = {
        "eager": function,
        "make_fx": lambda init: make_fx(function)(init + 1)(init),
        "aot_eager": torch.compile(function, backend="aot_eager", fullgraph=True),
        "inductor": torch.compile(function, fullgraph=True),
        "vmap": mapped,
    }
    x, status = runs[mode](torch.tensor([1.0, 2.0]))
    assert not status.converged
    assert status.iterations == steps
    torch.testing.assert_close(x, torch.tensor(last))


def test_every_item_of_a_batch_ends_where_it_would_alone() -> None:
    factors = torch.tensor([0.0, 0.5, -1.0])
    x, status = vmap(lambda a: fixed_point(lambda x: a * x + 1, torch.zeros(1)))(factors)
    alone = [fixed_point(lambda x, a=a: a * x + 1, torch.zeros(1)) for a in factors]
    assert status.converged.tolist() == [True, True, False]
    torch.testing.assert_close(x, torch.stack([x for x, _ in alone]))
    assert status.iterations.tolist() == [s.iterations.item() for _, s in alone]


def test_no_steps_are_no_convergence() -> None:
    x, status = fixed_point(torch.cos, B, iterations=0)
    assert torch.equal(x, B)
    assert not status.converged
    with pytest.raises(hopkit.HopkitError, match=r"'controlflow_fixed_point' did not converge"):
        fixed_point(torch.cos, B, iterations=1, must_converge=True)


WRONG: dict[str, tuple[Function, str]] = {
    "shape": (lambda b: fixed_point(lambda x: x[:1], b), r"'step'.*gives float64\[1\] on cpu for float64\[2\]"),
    "structure": (lambda b: fixed_point(lambda x: (x,), b), r"'step'.*gives \(float64\[2\] on cpu,\) for"),
    "dtype": (lambda b: fixed_point(lambda x: x.float(), b), r"'step'.*gives float32\[2\] on cpu for"),
    "no vector": (lambda b: fixed_point(lambda x: x, (b, 1)), "'init' is .*close over the rest"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("mode", ["eager", "make_fx", "vmap", "aot_eager"])
def test_a_step_that_changes_more_than_values_is_an_error(wrong: str, mode: str) -> None:
    function, told = WRONG[wrong]
    runs: dict[str, Any] = {
        "eager": function,
        "make_fx": make_fx(function),
        "vmap": lambda b: vmap(function)(b[None]),
        "aot_eager": torch.compile(function, backend="aot_eager", fullgraph=True),
    }
    with pytest.raises(Exception, match=told):
        runs[mode](B)
