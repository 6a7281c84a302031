"""What has no gradient in a subgraph has none in its graph, whoever differentiates that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import hopkit
from tests.recording import define_once

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's, of its own code
]

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def define_either() -> hopkit.Op[..., Tensor]:
    def abstract(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.empty_like(body(x))

    @hopkit.define("t_either", abstract=abstract)
    def either(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``body(x)``, and zeros if that is all positive."""
        y = body(x)
        return y * 0 if bool((y > 0).all()) else y * 1

    return either


def detached(x: Tensor) -> Tensor:
    return x.sin() * (x * x).detach()


def quiet(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = (x * x).exp()
        mask = torch.zeros_like(x)
        mask[0] = 1
    return x.sin() * y + mask * x


def slope(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(run(x).sum(), x)[0]


class Model(torch.nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)


@pytest.mark.parametrize("body", [detached, quiet])
@pytest.mark.parametrize("make", [define_once, define_either])
def test_a_graph_that_is_differentiated_later(
    make: Callable[[], hopkit.Op[..., Tensor]], body: Callable[[Tensor], Tensor]
) -> None:
    op = make()

    def run(x: Tensor) -> Tensor:
        return op(body, x)

    graph = make_fx(run)(X)
    assert len(graph.graph.find_nodes(op="call_function", target=op.operator)) == 1
    functional = make_fx(torch.func.functionalize(run))(X)
    program = torch.export.export(Model(run), (X,), strict=False)
    later = [graph, functional, program.module(), program.run_decompositions().module()]
    for found in later:
        assert_close(slope(found, X), slope(body, X))
    if make is define_either:  # and nobody knows which way it goes
        return
    flat = hopkit.flatten(graph)
    assert "hopkit" not in str(flat.code)
    assert_close(slope(flat, X), slope(body, X))


def test_what_runs_without_gradients_has_tangents() -> None:
    """As in eager: only detached parts have none."""
    once = define_once()
    graph = make_fx(lambda x: once(quiet, x))(X)
    assert_close(torch.func.jvp(graph, (X,), (X.cos(),)), torch.func.jvp(quiet, (X,), (X.cos(),)))
    hessian = torch.func.hessian(lambda x: graph(x).sin().sum())
    assert_close(hessian(X), torch.func.hessian(lambda x: quiet(x).sin().sum())(X))


def test_a_part_that_is_written_to_is_refused() -> None:
    either = define_either()

    def through_a_view(x: Tensor) -> Tensor:
        y = x * 2
        y.detach().mul_(3)
        return y * x

    def while_off(x: Tensor) -> Tensor:
        y = x * 2
        with torch.no_grad():
            y.mul_(3)
        return y * x

    for body, why in ((through_a_view, "writes to what it has detached"), (while_off, "and gradients are off")):
        with pytest.raises(hopkit.HopkitError, match=why):
            make_fx(lambda x: slope(lambda x: either(body, x), x))(X)  # noqa: B023 # it runs here


def test_an_op_within_a_detached_part_of_another() -> None:
    """Its halves are recorded in the graph of the other, which is differentiated."""
    once, either = define_once(), define_either()

    def body(x: Tensor) -> Tensor:
        return x * once(lambda y: y.sin() * x.detach(), x)

    compiled = torch.compile(lambda x: either(body, x), backend="aot_eager", fullgraph=True)
    assert_close(slope(compiled, X), slope(body, X))
