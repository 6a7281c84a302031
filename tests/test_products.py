"""Products of matrices in a step that trains: Inductor computes each of them once, and the gradients are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hopkit_controlflow import map, scan
from torch import Tensor
from torch.testing import assert_close

from hopkit._torch.inductor import written

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's own use
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
]

Step = Callable[[Tensor, Tensor, Tensor], Any]
Run = Callable[[Step, Tensor, Tensor], Tensor]

X = torch.linspace(-1, 1, 210, dtype=torch.float64).reshape(70, 3)
W = torch.linspace(-0.4, 0.6, 9, dtype=torch.float64).reshape(3, 3)


def plain(step: Step, x: Tensor, w: Tensor) -> Tensor:
    c, ys = torch.zeros_like(x[0]), []
    for row in x.unbind():
        c, y = step(c, row, w)
        ys.append(y)
    return torch.stack(ys) * c


def scanned(step: Step, x: Tensor, w: Tensor) -> Tensor:
    c, y = scan(lambda c, row: step(c, row, w), torch.zeros_like(x[0]), x)
    return torch.mul(y, c)


def mapped(step: Step, x: Tensor, w: Tensor) -> Tensor:
    return torch.mul(map(lambda row: step(row.cos(), row, w), x)[1], 2)


def once(c: Tensor, x: Tensor, w: Tensor) -> Any:
    c = (c @ w).tanh() * 0.5 + x
    return c, (c + x).sin()


def twice(c: Tensor, x: Tensor, w: Tensor) -> Any:
    c = ((c @ w).tanh() @ w).sin() + x
    return c, c * x


def alike(c: Tensor, x: Tensor, w: Tensor) -> Any:
    """Two products that differ only in what is multiplied."""
    return (c @ w).tanh() + x, (c @ w.T).sin() + (x @ w).cos() * c


def given(c: Tensor, x: Tensor, w: Tensor) -> Any:
    """The product is what the step gives, twice."""
    c = c @ w + x
    product = c @ w
    return c.sin(), product.tanh() + product


def itself(c: Tensor, x: Tensor, w: Tensor) -> Any:
    product = c @ w
    return product.sin() + x, product


def batched(c: Tensor, x: Tensor, w: Tensor) -> Any:
    c = torch.nn.functional.linear(torch.stack([c, x]), w, x).tanh().sum(0)
    return c, torch.einsum("i,ij->j", c, w).exp()


def changed(c: Tensor, x: Tensor, w: Tensor) -> Any:
    """What is multiplied is written to between two products."""
    a, v = c.sin(), w.detach()  # autograd keeps ``v``, and not ``a``
    row = a.unsqueeze(0)
    y = (row @ v).tanh().squeeze(0)
    a.mul_(0.5)
    return (row @ v).sin().squeeze(0) + (c @ w).cos() * x, y


def gradients(run: Run, step: Step) -> tuple[Tensor, ...]:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = run(step, x, w)
    return y, *torch.autograd.grad(y.cos().sum(), (x, w))


def compiled(run: Run, backend: str = "inductor") -> Run:
    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, backend=backend)


TRANSFORMED: dict[str, Callable[[Run], Run]] = {
    "vmap": lambda run: lambda step, x, w: torch.vmap(lambda w: run(step, x, w))(torch.stack([w, w.sin()])).sum(0),
    "what is written to afterwards": lambda run: lambda step, x, w: run(step, x, w).mul_(2) + x.sum(),
}


@pytest.mark.parametrize("step", [batched, changed], ids=lambda step: step.__name__)
def test_gradients(step: Step) -> None:
    assert_close(gradients(compiled(scanned), step), gradients(plain, step))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_of_other_compilers(backend: str) -> None:
    assert_close(gradients(compiled(scanned, backend), alike), gradients(plain, alike))


@pytest.mark.parametrize("how", TRANSFORMED)
def test_transformed(how: str) -> None:
    found = gradients(compiled(TRANSFORMED[how](scanned)), alike)
    assert_close(found, gradients(TRANSFORMED[how](plain), alike))


def test_a_tangent_of_a_gradient() -> None:
    def tangent(run: Run, step: Step, x: Tensor, w: Tensor) -> Any:
        slope = torch.func.grad(lambda w: run(step, x, w).cos().sum())
        return torch.func.jvp(slope, (w,), (w.cos(),))

    torch.compiler.reset()
    found = torch.compile(tangent, fullgraph=True, backend="eager")(scanned, alike, X, W)
    assert_close(found, tangent(plain, alike, X, W))


def test_a_length_that_changes() -> None:
    torch.compiler.reset()
    run = torch.compile(scanned, fullgraph=True, dynamic=True)
    for length in (70, 80):
        x, w = X.repeat(2, 1)[:length].requires_grad_(), W.clone().requires_grad_()
        found, want = (torch.autograd.grad(r(once, x, w).cos().sum(), (x, w)) for r in (run, plain))
        assert_close(found, want)


@pytest.mark.parametrize(
    ("run", "step", "count"),
    [(scanned, once, 2), (scanned, twice, 4), (scanned, given, 4), (scanned, itself, 2), (mapped, once, 2)],
)
def test_no_product_is_computed_again(run: Run, step: Step, count: int) -> None:
    found, code = written(lambda: gradients(compiled(run), step))
    assert_close(found, gradients(mapped if run is mapped else plain, step))
    assert code.count("extern_kernels.") == count  # in backward only those of the gradients
