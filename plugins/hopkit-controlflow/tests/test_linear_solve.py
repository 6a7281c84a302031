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
    """By Cramer's rule: torch's own solution is wrong in forward mode within forward mode (2.13, 2.14)."""
    rows = a.unbind(-2)
    minors = torch.stack([torch.linalg.cross(rows[i - 2], rows[i - 1]) for i in range(3)], -1)
    return (minors @ b) / (rows[0] @ minors[..., 0])


def iterated(a: Tensor, b: Tensor) -> Any:
    return linear_solve(lambda x: a @ x, b, **EXACT)[0]


def conjugate(a: Tensor, b: Tensor) -> Any:
    """Of the normal equations."""
    return linear_solve(lambda x: a.mT @ (a @ x), a.mT @ b, symmetric=True, **EXACT)[0]


def apart(a: Tensor, b: Tensor) -> Any:
    """By solvers that autograd knows nothing of."""
    inverse = torch.linalg.inv_ex(a.detach())[0]
    return linear_solve(lambda x: a @ x, b, lambda b: inverse @ b.detach(), lambda b: inverse.mT @ b.detach(), **EXACT)[
        0
    ]


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


def both(function: Function) -> Any:
    return grad(reduced(function), argnums=(0, 1))


def second(function: Function) -> Any:
    return both(lambda a, b: torch.cat([t.reshape(-1) for t in both(function)(a, b)]))


def batch(run: Function) -> Any:
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
    "vmap of vmap": lambda f: batch(tape(vmap(vmap(f, (None, 0)), (0, None)))),
    "make_fx": lambda f: lambda a, b: make_fx(tape(f))(a, b + 1)(a, b),
    "make_fx of second": lambda f: lambda a, b: make_fx(second(f))(a, b + 1)(a, b),
    "recorded first": lambda f: lambda a, b: tape(make_fx(f)(a, b + 1))(a, b),
    "symbolic": lambda f: lambda a, b: tape(make_fx(f, tracing_mode="symbolic")(A[:2, :2], B[:2]))(a, b),
    "aot_eager": lambda f: tape(torch.compile(f, backend="aot_eager", fullgraph=True)),
    "inductor": lambda f: tape(torch.compile(f, fullgraph=True)),
    "compiled jvp": lambda f: torch.compile(lambda a, b: jvp(f, (a, b), TANGENTS), backend="aot_eager"),
    "compiled vmap": lambda f: torch.compile(batch(vmap(f)), backend="aot_eager"),
}  # fmt: skip


PLAIN = dict.fromkeys(["aot_eager", "inductor", "symbolic", "make_fx", "recorded first"], "tape") | {
    "compiled jvp": "jvp",
    "compiled vmap": "vmap",
    "make_fx of second": "second",
}
"""What a mode is to give, where something records."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_the_closed_form(solver: str, mode: str) -> None:
    torch.testing.assert_close(MODES[mode](SOLVERS[solver])(A, B), MODES[PLAIN.get(mode, mode)](closed)(A, B))


def test_recorded_it_is_one_node_and_so_is_its_derivative() -> None:
    graph = make_fx(tape(iterated))(A, B)
    assert len(graph.graph.find_nodes(op="call_function", target=hopkit_controlflow.linear_solve.operator)) == 2


def test_complex_numbers() -> None:
    a, b = torch.complex(A, A.cos()), torch.complex(B, B.sin())
    for function in (
        iterated,
        lambda a, b: linear_solve(lambda x: a.mH @ (a @ x), a.mH @ b, symmetric=True, **EXACT)[0],
    ):
        sources = a.clone().requires_grad_(), b.clone().requires_grad_()
        torch.testing.assert_close(function(*sources), closed(*sources))
        weight = torch.complex(B.cos(), B)
        got, want = (torch.autograd.grad(f(*sources), sources, weight) for f in (function, closed))
        torch.testing.assert_close(got, want)


SINGULAR = torch.tensor([[1.0, 2.0], [2.0, 4.0]])


@pytest.mark.parametrize("options", [{}, {"symmetric": True}])
@pytest.mark.parametrize("mode", ["eager", "make_fx", "aot_eager", "inductor"])
def test_no_convergence_is_a_status(options: Any, mode: str) -> None:
    def function(b: Tensor) -> Any:
        return linear_solve(lambda x: SINGULAR @ x, b, **options)

    runs: dict[str, Any] = {
        "eager": lambda b: function(b),
        "make_fx": lambda b: make_fx(function)(b + 1)(b),
        "aot_eager": torch.compile(function, backend="aot_eager", fullgraph=True),
        "inductor": torch.compile(function, fullgraph=True),
    }
    x, status = runs[mode](torch.tensor([1.0, 0.0]))
    assert not status.converged
    assert x.isfinite().all()
    x, status = runs[mode](torch.tensor([1.0, 2.0]))
    assert status.converged
    torch.testing.assert_close(SINGULAR @ x, torch.tensor([1.0, 2.0]))


def test_every_item_of_a_batch_has_its_own_status() -> None:
    matrices = torch.stack([torch.eye(2), SINGULAR, torch.diag(torch.tensor([1.0, 2.0]))])
    x, status = vmap(lambda a: linear_solve(lambda x: a @ x, torch.tensor([1.0, 1.0])))(matrices)
    assert status.converged.tolist() == [True, False, True]
    assert status.iterations.tolist() == [1, 1, 2]
    torch.testing.assert_close(x[2], torch.tensor([1.0, 0.5]))


def test_too_few_iterations_and_what_is_no_number() -> None:
    _, status = linear_solve(lambda x: A @ x, B, iterations=2, **EXACT)
    assert (status.converged.item(), status.iterations.item()) == (False, 2)
    for options in ({}, {"symmetric": True}):
        assert not linear_solve(lambda x: A @ x, B * torch.nan, **options)[1].converged
    assert not linear_solve(lambda x: A @ x, B, lambda b: b * torch.nan)[1].converged
    assert linear_solve(lambda x: A @ x, 0 * B)[1].converged


@pytest.mark.parametrize("run", [tape, both, lambda f: lambda a, b: make_fx(tape(f))(a, b)(a, b)])
def test_a_derivative_that_does_not_converge_is_an_error(run: Function) -> None:
    with pytest.raises(
        hopkit.HopkitError, match=r"'controlflow_linear_solve' did not converge.*Allow more `iterations`"
    ):
        run(lambda a, b: linear_solve(lambda x: a @ x, b, iterations=1)[0])(A, B)
    with pytest.raises(hopkit.HopkitError, match="did not converge"):
        linear_solve(lambda x: A @ x, B, iterations=1, must_converge=True)


WRONG: dict[str, tuple[Any, str]] = {
    "not square": (lambda b: linear_solve(lambda x: x[:2], b), r"'matvec'.*gives float64\[2\] on cpu for float64\[3\]"),
    "structure": (lambda b: linear_solve(lambda x: (x,), b), r"'matvec'.*gives \(float64\[3\] on cpu,\) for"),
    "dtype": (lambda b: linear_solve(lambda x: x.float(), b), r"'matvec'.*gives float32\[3\] on cpu for"),
    "solve": (lambda b: linear_solve(lambda x: x, b, lambda b: b.sum()), r"'solve'.*gives float64\[\] on cpu for"),
    "no vector": (lambda b: linear_solve(lambda x: x, {"b": b, "n": 3}), "'b' is {b: float64"),
    "two kinds": (lambda b: linear_solve(lambda x: x, (b, b.float())), "'b' is .*one dtype"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("mode", ["eager", "make_fx", "vmap", "aot_eager"])
def test_what_is_no_system_is_an_error_that_says_so(wrong: str, mode: str) -> None:
    function, told = WRONG[wrong]
    runs: dict[str, Any] = {
        "eager": function,
        "make_fx": make_fx(function) if mode == "make_fx" else None,
        "vmap": lambda b: vmap(function)(b[None]),
        "aot_eager": torch.compile(function, backend="aot_eager", fullgraph=True),
    }
    with pytest.raises(Exception, match=told):
        runs[mode](B)
