"""``linear_solve``: the closed form in every mode and to every order, whatever solves; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hopkit_controlflow
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit.testing import check

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's, where it loads forward mode
    pytest.mark.filterwarnings("ignore:Error detected in"),
]

linear_solve: Any = hopkit_controlflow.linear_solve
grad: Any = torch.func.grad
jvp: Any = torch.func.jvp
vmap: Any = torch.vmap

A = torch.tensor([[2.0, 0.5, 0.0], [-0.3, 1.5, 0.2], [0.1, 0.4, 1.0]], dtype=torch.float64)
B = torch.linspace(-1, 1, 3, dtype=torch.float64)
TANGENTS = A.sin(), B.cos()
EXACT = {"tolerance": 1e-13}

Function = Callable[..., Any]


def closed(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve_ex(a, b)[0]


def iterated(a: Tensor, b: Tensor) -> Any:
    return linear_solve(lambda x: a @ x, b, **EXACT)[0]


def conjugate(a: Tensor, b: Tensor) -> Any:
    """Of the normal equations."""
    return linear_solve(lambda x: a.mT @ (a @ x), a.mT @ b, symmetric=True, **EXACT)[0]


def apart(a: Tensor, b: Tensor) -> Any:
    """By solvers that autograd knows nothing of."""
    inverse = torch.linalg.inv_ex(a.detach())[0]
    return linear_solve(lambda x: a @ x, b, lambda b: inverse @ b.detach(), lambda b: inverse.mT @ b.detach(), **EXACT)[0]


SOLVERS = {"iterated": iterated, "conjugate": conjugate, "apart": apart}


def reduced(function: Function) -> Function:
    return lambda a, b: function(a, b).square().sum()


def tape(function: Function) -> Function:
    """By the arguments, on the autograd tape."""

    def run(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        sources = a.detach().requires_grad_(), b.detach().requires_grad_()
        return torch.autograd.grad(reduced(function)(*sources), sources)

    return run


def plain_forward_mode(function: Function) -> Function:
    def run(a: Tensor, b: Tensor) -> Any:
        with torch.autograd.forward_ad.dual_level():
            dual = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip((a, b), TANGENTS, strict=True)]
            return torch.autograd.forward_ad.unpack_dual(function(*dual))

    return run


def both(function: Function) -> Function:
    return grad(reduced(function), argnums=(0, 1))


def second(function: Function) -> Function:
    return both(lambda a, b: torch.cat([t.reshape(-1) for t in both(function)(a, b)]))


def batch(run: Function) -> Function:
    return lambda a, b: run(torch.stack([a, 2 * a]), torch.stack([b, b + 1]))


MODES: dict[str, Function] = {
    "tape": tape,
    "grad": both,
    "second": second,
    "third": lambda f: both(lambda a, b: torch.cat([t.reshape(-1) for t in second(f)(a, b)])),
    "jvp": lambda f: lambda a, b: jvp(f, (a, b), TANGENTS),
    "jvp of jvp": lambda f: lambda a, b: jvp(lambda a, b: jvp(f, (a, b), TANGENTS)[1], (a, b), TANGENTS),
    "jvp of grad": lambda f: lambda a, b: jvp(both(f), (a, b), TANGENTS),
    "plain forward mode": plain_forward_mode,
    "vmap": lambda f: batch(vmap(f)),
    "vmap over the matrix": lambda f: lambda a, b: vmap(f, (0, None))(torch.stack([a, 2 * a]), b),
    "vmap over the vector": lambda f: lambda a, b: vmap(f, (None, 1))(a, torch.stack([b, b + 1], 1)),
    "tape of vmap": lambda f: batch(tape(vmap(f))),
    "tape of vmap over the matrix": lambda f: lambda a, b: tape(vmap(f, (0, None)))(torch.stack([a, 2 * a]), b),
    "vmap of second": lambda f: batch(vmap(second(f))),
    "vmap of jvp": lambda f: lambda a, b: vmap(lambda b: jvp(f, (a, b), TANGENTS))(torch.stack([b, b + 1])),
    "vmap of vmap": lambda f: lambda a, b: tape(vmap(vmap(f, (None, 0)), (0, None)))(torch.stack([a, 2 * a]), torch.stack([b, b + 1])),
    "make_fx": lambda f: lambda a, b: make_fx(tape(f))(a, b + 1)(a, b),
    "make_fx of second": lambda f: lambda a, b: make_fx(second(f))(a, b + 1)(a, b),
    "recorded first": lambda f: lambda a, b: tape(make_fx(f)(a, b + 1))(a, b),
    "symbolic": lambda f: lambda a, b: tape(make_fx(f, tracing_mode="symbolic")(A[:2, :2], B[:2]))(a, b),
    "aot_eager": lambda f: tape(torch.compile(f, backend="aot_eager", fullgraph=True)),
    "inductor": lambda f: tape(torch.compile(f, fullgraph=True)),
    "compiled jvp": lambda f: torch.compile(lambda a, b: jvp(f, (a, b), TANGENTS), backend="aot_eager"),
    "compiled vmap": lambda f: torch.compile(batch(vmap(f)), backend="aot_eager"),
}  # fmt: skip


def test_it_is_right_in_every_mode() -> None:
    report = check(hopkit_controlflow.linear_solve)
    assert report.ok, str(report)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_the_closed_form(solver: str, mode: str) -> None:
    want = MODES[mode](closed)(A, B) if "compiled" not in mode else None
    if mode in ("aot_eager", "inductor", "symbolic", "make_fx", "recorded first"):
        want = tape(closed)(A, B)
    want = want if want is not None else {"compiled jvp": MODES["jvp"], "compiled vmap": MODES["vmap"]}[mode](closed)(A, B)
    torch.testing.assert_close(MODES[mode](SOLVERS[solver])(A, B), want)
