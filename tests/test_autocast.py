"""Autocast: an op has the values, the dtypes and the gradients of its body, in every way to run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hopkit._torch.fakes import FakeMode
from tests.recording import define_twice, record, same

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),  # torch's own decompositions
]

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)

Function = Callable[..., Any]


def plain(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `define_twice` defines, as a function."""
    result: Tensor = 1.0 * body(body(x))
    return result


BODIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lower": lambda y, w: y @ w,
    "float32": lambda y, w: (y @ w).softmax(-1),
    "promoted": lambda y, w: torch.cat([y @ w, y.float()])[: y.shape[0]],
    "off inside": lambda y, w: _off(lambda: y.float() @ w.float()),
    "on inside": lambda y, w: _on(lambda: y @ w),
}


def _off(run: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return run()


def _on(run: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return run()


WAYS: dict[str, Callable[[Function], Function]] = {
    "eager": lambda run: run,
    "compiled": lambda run: torch.compile(run, backend="aot_eager"),
    "checkpointed": lambda run: lambda x, w: checkpoint(run, x, w, use_reentrant=False),
}


def trained(run: Function, dtype: torch.dtype, leaf: torch.dtype) -> tuple[object, list[torch.dtype]]:
    """Value and gradients, and their dtypes; backward runs outside of autocast, as torch recommends."""
    x, w = X.to(leaf, copy=True).requires_grad_(), W.to(leaf, copy=True).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        result = run(x, w)
    found = (result, *torch.autograd.grad(result.float().sum(), [x, w]))
    return found, [t.dtype for t in found]


@pytest.mark.parametrize("leaf", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("way", WAYS)
def test_values_gradients_and_dtypes(way: str, name: str, dtype: torch.dtype, leaf: torch.dtype) -> None:
    twice, body = define_twice(), BODIES[name]

    def run(call: Function) -> Function:
        return WAYS[way](lambda x, w: call(lambda y: body(y, w), x))

    found, dtypes = trained(run(twice), dtype, leaf)
    wanted, expected = trained(run(plain), dtype, leaf)
    assert dtypes == expected
    same(found, wanted)


@pytest.mark.parametrize("name", ["lower", "float32"])
def test_a_graph_that_is_recorded_under_autocast(name: str) -> None:
    twice, body = define_twice(), BODIES[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = plain(lambda y: body(y, W), X)
        graph = record(lambda x: twice(lambda y: body(y, W), x), X)
    got = graph(X)
    assert got.dtype == wanted.dtype
    same(got, wanted)


@pytest.mark.parametrize("transform", ["jvp", "vjp", "vmap"])
def test_transforms_under_autocast(transform: str) -> None:
    def transformed(call: Function) -> object:
        def run(x: Tensor) -> Tensor:
            result: Tensor = call(lambda y: y @ W, x)
            return result

        with torch.autocast("cpu", dtype=torch.bfloat16):
            if transform == "jvp":
                return torch.func.jvp(run, (X,), (X.cos(),))
            if transform == "vjp":
                value, pull = torch.func.vjp(run, X)[:2]
                return value, pull(torch.ones_like(value))
            return torch.vmap(run)(torch.stack([X, X + 1]))

    same(transformed(define_twice()), transformed(plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_on_a_gpu(dtype: torch.dtype) -> None:
    """On stand-ins, as there is no GPU: forward alone, for torch's engine wants the device itself."""

    def dtypes(call: Function) -> list[torch.dtype]:
        torch.set_autocast_enabled("cuda", True)  # torch.autocast turns itself off where there is none
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_dtype("cuda", dtype)
        try:
            with FakeMode():
                x, w = torch.empty(4, 3, device="cuda"), torch.empty(3, 3, device="cuda")
                return [call(body, x).dtype for body in (lambda y: y @ w, lambda y: (y @ w).softmax(-1))]
        finally:
            torch.set_autocast_dtype("cuda", before)
            torch.set_autocast_enabled("cuda", False)

    found = dtypes(define_twice())
    assert found == dtypes(plain) == [dtype, torch.float32]
