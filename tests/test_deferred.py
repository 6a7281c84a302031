"""autograd="deferred_error" where AOTAutograd records forward and backward: who runs backward is told, as in eager."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, nop  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hopkit
from hopkit import Op, Subgraph
from tests.recording import define_twice, nodes, plainly, same

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*"),  # torch's, of its own code
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
]

X = torch.linspace(-1.0, 1.0, 16).reshape(4, 4)
ERROR = "Autograd not implemented for t_deferred"


def define(**settings: Any) -> Op[..., Any]:
    @hopkit.define("t_deferred", autograd="deferred_error", **settings)
    def deferred(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    return deferred


def leaf() -> Tensor:
    return X.clone().requires_grad_()


PLACES: dict[str, Callable[[Any, Any, Tensor], Tensor]] = {
    "alone": lambda op, _, x: op(torch.sin, x),
    "a capture": lambda op, _, x: op(lambda y: y.sin() * x, x.detach()),
    "in an op": lambda op, twice, x: twice(lambda y: op(torch.sin, y) * 2, x),
    "in a checkpoint": lambda op, _, x: checkpoint(lambda x: op(torch.sin, x).cos(), x, use_reentrant=False),
}


@pytest.mark.parametrize("outline", [False, True])
@pytest.mark.parametrize(
    ("name", "backend"), [*itertools.product(PLACES, ("eager", "aot_eager")), ("in an op", "inductor")]
)
def test_backward_raises(name: str, backend: str, outline: bool) -> None:
    op, twice = define(outline=outline), define_twice()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: PLACES[name](op, twice, x), backend=backend, fullgraph=True)
    result = compiled(leaf())
    same(result, PLACES[name](op, twice, X))
    with pytest.raises(RuntimeError, match=ERROR):
        result.sum().backward()
    with torch.no_grad():
        same(compiled(X), PLACES[name](op, twice, X))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_outputs_that_nobody_differentiates(backend: str) -> None:
    op = define()
    torch.compiler.reset()
    x = leaf()
    torch.compile(lambda x: (op(torch.sin, x), x * 2), backend=backend, fullgraph=True)(x)[1].sum().backward()
    same(x.grad, torch.full_like(X, 2))


def test_the_node_is_kept_ahead_of_time() -> None:
    op, graphs = define(), list[torch.nn.Module]()

    def keep(graph: torch.nn.Module, inputs: object) -> object:
        graphs.append(graph)
        return nop(graph, inputs)

    result = aot_function(lambda x: op(torch.sin, x), keep)(leaf())
    with pytest.raises(RuntimeError, match=ERROR):
        result.sum().backward()
    assert [nodes(graph, op) for graph in graphs] == [1, 0]


TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vmap": lambda op, x: torch.vmap(lambda y: op(torch.sin, y))(x),
    "grad": lambda op, x: torch.func.grad(lambda y: op(torch.sin, y).sum())(x),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_under_a_transform_the_gradient_is_that_of_the_body(name: str, backend: str) -> None:
    op = define()
    torch.compiler.reset()
    x, plain = leaf(), leaf()
    result = torch.compile(lambda x: TRANSFORMS[name](op, x), backend=backend, fullgraph=True)(x)
    result.sum().backward()
    torch.compiler.reset()
    want = plainly(lambda x: TRANSFORMS[name](op, x), plain)
    assert isinstance(want, Tensor)
    want.sum().backward()
    same((result, x.grad), (want, plain.grad))
