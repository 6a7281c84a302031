"""Derivatives by the equation that an op solves, and what bodies that differentiate need."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import Subgraph
from hopkit.extend.body import pull, split
from hopkit.extend.implicit import Values, derive
from tests.recording import define_once, nodes, same

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's, where it loads forward mode
]

X = torch.linspace(1.0, 2.0, 3, dtype=torch.float64)
W = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
grad: Any = torch.func.grad
jvp: Any = torch.func.jvp


class _Root:
    """``body(x) - target = 0``, item by item."""

    like = "target"

    def residual(self, values: Values, x: Tensor) -> Tensor:
        residual: Tensor = values["body"](x) - values["target"]
        return residual

    def solve(self, values: Values, x: Tensor, right: Tensor, *, transposed: bool) -> Tensor:  # diagonal
        return right / -pull(values["body"], x, torch.ones_like(x))


def define_root() -> Any:
    """An op whose body autograd cannot follow."""

    @hopkit.define(
        "t_root",
        inputs=lambda body, target: ((target,),),
        outputs=lambda body, target: body(target).new_empty(target.shape),
    )
    def root(body: Subgraph, target: Tensor) -> Tensor:
        x = target.detach()
        while hopkit.anywhere((body(x) - target).abs().max() > 1e-12):
            x = (x - (body(x) - target) / pull(body, x, torch.ones_like(x))).detach()
        return x

    derive(root, _Root())
    return root


def solved(root: Any) -> Callable[[Tensor, Tensor], Any]:
    return lambda target, w: root(lambda x: x**3 * w, target)


def closed(target: Tensor, w: Tensor) -> Tensor:
    return (target / w) ** (1 / 3)


def tape(function: Any) -> Any:
    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        sources = x.detach().requires_grad_(), w.detach().requires_grad_()
        first = torch.autograd.grad(function(*sources).sum(), sources, create_graph=True)
        return (*first, *torch.autograd.grad([t.sum() for t in first], sources))

    return run


def plain_forward_mode(function: Any) -> Any:
    def run(x: Tensor, w: Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, w), forward_ad.make_dual(w, x)))

    return run


MODES: dict[str, Any] = {
    "tape": tape,
    "grad of grad": lambda f: grad(lambda x, w: grad(lambda x, w: f(x, w).sum(), 1)(x, w).sum()),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (w, x)),
    "jvp of jvp": lambda f: lambda x, w: jvp(lambda x, w: jvp(f, (x, w), (w, x))[1], (x, w), (w, x)),
    "plain forward mode": plain_forward_mode,
    "tape of vmap": lambda f: lambda x, w: tape(torch.vmap(f, (None, 1)))(x, torch.stack([w, w + 1], 1)),
    "jvp of vmap": lambda f: (
        lambda x, w: jvp(lambda x: torch.vmap(f, (None, 0))(x, torch.stack([w, w + 1])), (x,), (w,))
    ),
    "make_fx": lambda f: make_fx(lambda x, w: tape(f)(x, w))(X + 1, W),
    "recorded first": lambda f: tape(make_fx(f)(X + 1, W)),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_derivative_is_that_of_the_equation(mode: str) -> None:
    same(MODES[mode](solved(define_root()))(X, W), MODES[mode](closed)(X, W))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_too(backend: str) -> None:
    function = torch.compile(solved(define_root()), backend=backend, fullgraph=True)
    sources = X.clone().requires_grad_(), W.clone().requires_grad_()
    same(torch.autograd.grad(function(*sources).sum(), sources), tape(closed)(X, W)[:2])


def test_before_dispatch_it_is_a_node() -> None:
    root, w = define_root(), W.clone().requires_grad_()
    graph = make_fx(lambda x: root(lambda y: y**3 * w, x), pre_dispatch=True)(X)
    assert nodes(graph, root) == 1
    same(torch.autograd.grad(graph(X).sum(), w), tape(closed)(X, W)[1:2])


def test_a_subgraph_may_differentiate_where_its_captures_are_in_a_transform() -> None:
    once = define_once()

    def function(x: Tensor, w: Tensor) -> Any:
        return once(lambda g: pull(lambda x: x**3 * w, x * 1, g), torch.ones_like(x))

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return 3 * x**2 * w

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run, want in ((function, plain), (grad(lambda x, w: function(x, w).sum()), lambda x, w: 6 * x * w)):
            same(run(X, W), want(X, W))
            graph = make_fx(run)(X + 1, W)
            same(graph(X, W), want(X, W))


def test_split_leaves_the_rest_in_its_place() -> None:
    tensors, fill = split({"a": X, "n": 3, "i": torch.arange(2)})
    assert [t is X for t in tensors] == [True]
    assert fill([W])["a"] is W
    assert fill([W])["n"] == 3
    assert fill([W], None) == {"a": W, "n": None, "i": None}


class Both(NamedTuple):
    """A named tuple of tensors."""

    first: Tensor
    second: object


@pytest.mark.parametrize("nested", [False, True])
def test_dynamo_gives_named_tuples(nested: bool) -> None:
    @hopkit.define("t_both")
    def both(body: Subgraph, x: Tensor) -> object:
        found = Both(body(x), {"twice": (x * 2,)})
        return {"one": [found, x + 1]} if nested else found

    found: Any = torch.compile(lambda x: both(torch.sin, x), backend="aot_eager", fullgraph=True)(X)
    want: Any = both(torch.sin, X)
    assert isinstance(found["one"][0] if nested else found, Both)
    same(found, want)


def test_outputs_may_call_a_subgraph_under_a_compiled_vmap() -> None:
    function = torch.compile(torch.vmap(solved(define_root()), (None, 0)), backend="aot_eager", fullgraph=True)
    w = torch.stack([W, W + 1])
    same(function(X, w), closed(X, w))
