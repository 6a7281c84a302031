"""``custom_vjp``: its law in every mode, to any order; what it closes over; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hopkit_controlflow
import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, vmap
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's, where it loads forward mode

X = torch.tensor([1000.0, 1.0, -1.0], dtype=torch.float64)
S = torch.sigmoid(X)
W = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
ONES = torch.ones_like(X)

Function = Callable[[Tensor], Tensor]
grad: Any = torch.func.grad
jvp: Any = torch.func.jvp
custom_vjp: Any = hopkit_controlflow.custom_vjp


def log1pexp(x: Tensor) -> Any:
    """JAX's example. Where ``x`` is large its code overflows, and so does the code's derivative."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(x < 100, (1 + x.exp()).log(), x), x

    return custom_vjp(forward, lambda x, g: (g * torch.sigmoid(x),), (x,))


def scaled(x: Tensor, w: Tensor) -> Any:
    """Forward closes over ``w``."""
    return custom_vjp(lambda x: (x.sin() * w, (x.cos(), w)), lambda kept, g: (g * kept[0] * kept[1],), (x,))


def slope(function: Function) -> Function:
    """The derivative of ``function``, on the autograd tape."""

    def run(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    return run


MODES: dict[str, Any] = {
    "tape": slope,
    "grad": lambda f: grad(lambda x: f(x).sum()),
    "vmap of grad": lambda f: vmap(grad(f)),
    "grad of vmap": lambda f: slope(lambda x: vmap(f)(x)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (ONES,))[1],
    "make_fx": lambda f: make_fx(slope(f))(X),
    "make_fx of grad": lambda f: make_fx(grad(lambda x: f(x).sum()))(X),
    "recorded first": lambda f: slope(make_fx(f)(X)),
    "recorded where it trains": lambda f: slope(make_fx(f)(X.clone().requires_grad_())),
    "aot_eager": lambda f: slope(torch.compile(f, backend="aot_eager", fullgraph=True)),
    "inductor": lambda f: slope(torch.compile(f, fullgraph=True)),
    "compiled grad": lambda f: torch.compile(grad(lambda x: f(x).sum()), backend="aot_eager"),
}


@pytest.mark.parametrize("mode", MODES)
def test_its_derivative_is_the_one_given(mode: str) -> None:
    torch.testing.assert_close(MODES[mode](log1pexp)(X), S)


SECOND: dict[str, Any] = {
    "grad of grad": lambda f: grad(lambda x: grad(lambda x: f(x).sum())(x).sum()),
    "vmap": lambda f: vmap(grad(grad(f))),
    "jvp of jvp": lambda f: lambda x: jvp(lambda x: jvp(f, (x,), (ONES,))[1], (x,), (ONES,))[1],
    "hessian": lambda f: lambda x: hessian(lambda x: f(x).sum())(x).diagonal(),
    "compiled": lambda f: torch.compile(grad(lambda x: grad(lambda x: f(x).sum())(x).sum()), backend="aot_eager"),
}


@pytest.mark.parametrize("mode", SECOND)
def test_a_second_derivative_goes_through_the_residuals(mode: str) -> None:
    torch.testing.assert_close(SECOND[mode](log1pexp)(X), S * (1 - S))


def test_a_second_derivative_of_a_recorded_one() -> None:
    def derived(x: Tensor) -> Tensor:
        return torch.autograd.grad(log1pexp(x).sum(), x, create_graph=True)[0]

    x = X.clone().requires_grad_()
    first = make_fx(derived)(X.clone().requires_grad_())(x)
    torch.testing.assert_close(first.detach(), S)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], S * (1 - S))


def test_a_third_derivative() -> None:
    third = S * (1 - S) * (1 - 2 * S)
    torch.testing.assert_close(vmap(grad(grad(grad(log1pexp))))(X), third)
    torch.testing.assert_close(vmap(jacfwd(jacfwd(jacfwd(log1pexp))))(X), third)


def test_the_code_of_forward_is_not_differentiated() -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(*_: object) -> Tensor:
            raise AssertionError

    refuses: Any = Refuses.apply
    passed = slope(lambda x: custom_vjp(lambda x: (refuses(x), ()), lambda _, g: (g,), (x,)))
    assert torch.equal(passed(X), ONES)


def test_what_it_closes_over_has_its_own_derivative() -> None:
    for run in (scaled, vmap(scaled)):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        first = torch.autograd.grad(run(x, w).sum(), (x, w), create_graph=True)
        torch.testing.assert_close(first, (x.cos() * w, x.sin()))
        second = torch.autograd.grad(first[0].sum(), (x, w))  # by way of the residuals
        torch.testing.assert_close(second, (-x.sin() * w, x.cos()))
    torch.testing.assert_close(vmap(grad(scaled, argnums=(0, 1)))(X, W), (X.cos() * W, X.sin()))
    for moved, want in (((0 * ONES, ONES), X.sin()), ((ONES, ONES), X.sin() + X.cos() * W)):
        torch.testing.assert_close(jvp(scaled, (X, W), moved)[1], want)
    torch.testing.assert_close(jvp(lambda w: scaled(X, w), (W,), (ONES,))[1], X.sin())


def by_w(x: Tensor) -> Any:
    """The derivative of ``scaled`` by what it closes over, to be differentiated by ``x``."""
    return vmap(grad(scaled, argnums=1))(x, W)


UNKNOWN: dict[str, Any] = {
    "tape": lambda: slope(
        lambda x: torch.autograd.grad(scaled(x, w := W.clone().requires_grad_()).sum(), w, create_graph=True)[0]
    )(X),
    "grad": lambda: grad(lambda x: by_w(x).sum())(X),
    "jvp of grad": lambda: jvp(by_w, (X,), (ONES,)),
    "grad of jvp": lambda: grad(lambda x: jvp(lambda w: scaled(x, w), (W,), (ONES,))[1].sum())(X),
    "jvp of jvp": lambda: jvp(lambda x: jvp(lambda w: scaled(x, w), (W,), (ONES,))[1], (X,), (ONES,)),
    "make_fx": lambda: make_fx(grad(lambda x: by_w(x).sum()))(X),
    "compiled": lambda: MODES["compiled grad"](by_w)(X),
}


@pytest.mark.parametrize("mode", UNKNOWN)
@pytest.mark.filterwarnings("ignore:Error detected in")
def test_a_mixed_derivative_by_what_it_closes_over_is_refused(mode: str) -> None:
    with pytest.raises(Exception, match=r"'forward'.*closes over.*Pass the tensor as an operand"):
        UNKNOWN[mode]()


def test_the_result_may_be_written_to() -> None:
    def function(x: Tensor) -> Any:
        return custom_vjp(lambda x: (x, ()), lambda _, g: (3 * g,), (x,))

    x = X.clone()
    function(x).zero_()
    assert torch.equal(x, X)


WRONG: dict[str, tuple[Any, Any, str]] = {
    "no pair": (torch.sin, lambda _, g: (g,), "'forward'.*gives a .*Tensor"),
    "no tuple": (lambda x: (x.sin(), ()), lambda _, g: g, r"'backward'.*gives float64\[3\] on cpu for 1 operands"),
    "too many": (lambda x: (x.sin(), ()), lambda _, g: (g, g), r"'backward'.*for 1 operands"),
    "structure": (
        lambda x: (x.sin(), ()),
        lambda _, g: ((g,),),
        r"'backward'.*\(float64\[3\] on cpu,\) for operand 0, which",
    ),
    "shape": (
        lambda x: (x.sin(), ()),
        lambda _, g: (g.sum(),),
        r"'backward'.*float64\[\] on cpu for float64\[3\] on cpu, which is in",
    ),
    "no tensor": (
        lambda x: (x.sin(), ()),
        lambda _, g: (1.0,),
        r"'backward'.*1.0 for .*64\[3\] on cpu, which is in",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("mode", ["tape", "grad", "make_fx", "aot_eager"])
@pytest.mark.filterwarnings("ignore:Error detected in")
def test_what_is_no_derivative_is_an_error_that_says_so(wrong: str, mode: str) -> None:
    forward, backward, told = WRONG[wrong]
    with pytest.raises(Exception, match=f"(?s)subgraph .*{told}"):
        MODES[mode](lambda x: custom_vjp(forward, backward, (x,)))(X)
