"""Gradients: those of captures too, to second order, in plain eager and in graphs that train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hopkit
from hopkit import HopkitWarning, Op, Subgraph
from hopkit.errors import AutogradError, CaptureError
from tests.recording import Function, define_once, define_twice, nodes, plainly, record, same, trained

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

Twice = Op[..., Tensor]
Model = Callable[[Twice, Tensor, Tensor], Tensor]


def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 9).reshape(3, 3).requires_grad_()


def w() -> Tensor:
    return torch.linspace(0.5, 1.5, 9).reshape(3, 3).requires_grad_()


class TenTimes(torch.autograd.Function):
    """A backward that is not the derivative, so that losing it shows."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return gradient * b * 10, gradient * a * 10


def ten_times(a: Tensor, b: Tensor) -> Tensor:
    return cast("Tensor", TenTimes.apply(a, b))  # type: ignore[no-untyped-call] # torch's own


def slope_of_sine(w: Tensor) -> Function:
    return torch.func.grad(lambda y: (y * w).sin().sum())


def by_rows(w: Tensor) -> Function:
    return torch.vmap(lambda row: (row * w[0]).sin())


def partly_frozen(y: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = y * w
    return frozen * y


def hooked(y: Tensor, w: Tensor) -> Tensor:
    product = y * w
    if product.requires_grad:
        product.register_hook(_triple)
    return product.sin()


def _triple(gradient: Tensor) -> Tensor:
    return gradient * 3


def own_gradient(y: Tensor, w: Tensor) -> Tensor:
    inner = y.detach().requires_grad_()
    return torch.autograd.grad((inner * w).sin().sum(), inner, create_graph=True)[0] * y


KEPT: dict[str, Model] = {
    "capture": lambda twice, x, w: twice(lambda y: (y @ w).sin(), x, scale=2.0),
    "capture and operand": lambda twice, x, w: twice(lambda y: y * x * w, x),
    "view of an operand": lambda twice, x, w: twice(lambda y: y * x[0] * w, x),
    "view taken outside": lambda twice, x, w: (lambda v: twice(lambda y: y * v * w, x))(x[0]),
    "only the capture": lambda twice, x, w: twice(lambda y: y * w, x.detach()),
    "only the operand": lambda twice, x, w: twice(partial(torch.mul, w.detach()), x),
    "written inside": lambda twice, x, w: twice(lambda y: (y * w).mul_(2).add_(y), x),
    "checkpoint inside": lambda twice, x, w: twice(
        lambda y: checkpoint(lambda a, b: (a @ b).sin(), y, w, use_reentrant=False), x
    ),
    "nested": lambda twice, x, w: twice(lambda y: twice(lambda z: (z * w).sin(), y) + w, x),
    "vmap inside": lambda twice, x, w: twice(by_rows(w), x),
    "func.grad inside": lambda twice, x, w: twice(slope_of_sine(w), x),
    "detached": lambda twice, x, w: twice(lambda y: (y * w).detach() * y, x),
    "autograd.grad inside": lambda twice, x, w: twice(lambda y: own_gradient(y, w), x),
    "no_grad": lambda twice, x, w: twice(lambda y: partly_frozen(y, w), x),
}
DECOMPOSED: dict[str, Model] = {
    "dropout": lambda twice, x, w: twice(lambda y: torch.nn.functional.dropout(y * w), x),
    "dropout in a nested op": lambda twice, x, w: twice(
        lambda y: twice(lambda z: torch.nn.functional.dropout(z * w), y) + w, x
    ),
    "backward of its own": lambda twice, x, w: twice(lambda y: ten_times(y, w), x),
    "backward in a nested op": lambda twice, x, w: twice(lambda y: twice(lambda z: ten_times(z, w), y) + w, x),
    "hook": lambda twice, x, w: twice(lambda y: hooked(y, w), x),
}

DECOMPOSED_AHEAD = ("backward of its own", "backward in a nested op")
"""AOTAutograd records forward and backward together; but the tensor that such a function takes is not replaced."""


def compare(step: Callable[..., object], recorded: Callable[..., object]) -> None:
    torch.manual_seed(0)
    want = plainly(step, x(), w())
    torch.manual_seed(0)
    same(recorded(x(), w()), want)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", [*KEPT, *DECOMPOSED])
def test_in_plain_eager(name: str, second: bool) -> None:
    twice = define_twice()
    step = trained(lambda x, w: (KEPT | DECOMPOSED)[name](twice, x, w), second=second)
    compare(step, step)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", [*KEPT, *DECOMPOSED])
def test_in_a_graph_that_trains(name: str, second: bool) -> None:
    twice = define_twice()
    step = trained(lambda x, w: (KEPT | DECOMPOSED)[name](twice, x, w), second=second)
    graph = record(step, x(), w())
    assert bool(nodes(graph, twice)) == (name in KEPT)
    compare(step, graph)


@pytest.mark.parametrize("name", [*KEPT, *DECOMPOSED])
def test_under_aot_autograd(name: str) -> None:
    twice = define_twice()
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def model(x: Tensor, w: Tensor) -> Tensor:
        return (KEPT | DECOMPOSED)[name](twice, x, w)

    compare(trained(model), trained(aot_function(model, compiler)))
    assert [bool(nodes(graph, twice)) for graph in graphs] == [name not in DECOMPOSED_AHEAD] * 2


@pytest.mark.parametrize("name", ["capture", "nested", "dropout", "no_grad"])
def test_under_torch_compile(name: str) -> None:
    twice = define_twice()

    def model(x: Tensor, w: Tensor) -> Tensor:
        return (KEPT | DECOMPOSED)[name](twice, x, w)

    torch.compiler.reset()
    compare(trained(model), trained(torch.compile(model, backend="aot_eager", fullgraph=True)))


Outputs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.mark.parametrize(
    "body",
    [
        lambda y, w: (y.sin(), w.cos()),
        lambda y, w: (y.argmax(0), y * w),
        lambda y, w: (y, y * w),
        lambda y, w: (w, y * w),
        lambda y, w: ((y * w).detach(), y * w),
        lambda y, w: (y.sin(), y.cos()),
    ],
    ids=["one each", "integers", "operand", "capture", "detached", "unused capture"],
)
def test_several_outputs(body: Outputs) -> None:
    @hopkit.define("t_pair")
    def pair(body: Subgraph[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        return body(x)

    step = trained(lambda x, w: pair(lambda y: body(y, w), x))
    compare(step, record(step, x(), w()))


def test_the_same_output_twice() -> None:
    @hopkit.define("t_pair")
    def pair(body: Subgraph, x: Tensor) -> tuple[Tensor, Tensor]:
        result = body(x)
        return result, result

    step = trained(lambda x, w: pair(lambda y: y * w, x))
    compare(step, record(step, x(), w()))


def test_a_gradient_that_is_not_there_is_none() -> None:
    @hopkit.define("t_pair")
    def pair(body: Subgraph[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        return body(x)

    def step(x: Tensor, w: Tensor) -> object:
        first, _ = pair(lambda y: (y.sin(), w.cos()), x)
        return torch.autograd.grad(first.sum(), [x, w], allow_unused=True)

    _, missing = record(step, x(), w())(x(), w())
    assert missing is None


def test_complex_numbers() -> None:
    twice = define_twice()
    step = trained(lambda x, w: twice(lambda y: y * w * 1j, torch.complex(x, w)).real)
    compare(step, record(step, x(), w()))


def test_a_reduction_in_the_body() -> None:
    @hopkit.define("t_total")
    def total(body: Subgraph, x: Tensor) -> Tensor:
        return (body(x) * body(x * 2)).sum(0)

    step = trained(lambda x, w: total(lambda y: (y * w).sin(), x), second=True)
    graph = record(step, x(), w())
    assert nodes(graph, total) == 3
    compare(step, graph)


def test_checkpointing_around_an_op() -> None:
    twice = define_twice()
    step = trained(lambda x, w: checkpoint(lambda a, b: twice(lambda y: (y @ b).sin(), a), x, w, use_reentrant=False))
    graph = record(step, x(), w())
    assert nodes(graph, twice)
    compare(step, graph)


def test_gradcheck() -> None:
    twice = define_twice()
    inputs = (x().detach().double().requires_grad_(), w().detach().double().requires_grad_())

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: (y * w).sin(), x)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own decompositions
def test_a_recorded_backward_under_transforms() -> None:
    twice = define_twice()

    graph = record(lambda x: torch.autograd.grad(twice(lambda y: (y * y).sin(), x).sum(), x)[0], x())
    pure = torch.func.grad(lambda a: plainly(lambda: twice(lambda y: (y * y).sin(), a)).sum())  # type: ignore[attr-defined] # a tensor
    point, direction = x().detach(), w().detach()
    same(torch.vmap(graph)(torch.stack([point, direction])), torch.vmap(pure)(torch.stack([point, direction])))
    same(torch.func.jvp(graph, (point,), (direction,)), torch.func.jvp(pure, (point,), (direction,)))
    same(torch.func.jacrev(graph)(point), torch.func.jacrev(pure)(point))


def test_a_branch_trains_where_it_says_its_shapes() -> None:
    @hopkit.define("t_if", inputs=lambda p, a, b, x: ((x,), (x,)), outputs=lambda p, a, b, x: torch.empty_like(x))
    def choose(p: Tensor, a: Subgraph, b: Subgraph, x: Tensor) -> Tensor:
        return a(x) if bool(p > 0) else b(x)

    step = trained(lambda x, w: choose(x.sum(), lambda y: y * w, lambda y: y.sin() * w, x))
    graph = record(step, x(), w())
    assert nodes(graph, choose) == 2
    for shift in (1.0, -1.0):
        same(graph(x() + shift, w()), plainly(step, (x() + shift), w()))


def test_a_branch_with_a_backward_of_its_own_is_refused() -> None:
    @hopkit.define("t_if", inputs=lambda p, a, x: ((x,),), outputs=lambda p, a, x: torch.empty_like(x))
    def choose(p: Tensor, a: Subgraph, x: Tensor) -> Tensor:
        return a(x) if bool(p > 0) else x * 2

    step = trained(lambda x, w: choose(x.sum(), lambda y: ten_times(y, w), x))
    with pytest.raises(AutogradError, match=r"op 't_if' cannot be recorded for training: it has a backward of its own"):
        record(step, x(), w())


def test_a_parameter_that_aot_autograd_does_not_know_is_named() -> None:
    @hopkit.define("t_if", inputs=lambda p, a, x: ((x,),), outputs=lambda p, a, x: torch.empty_like(x))
    def choose(p: Tensor, a: Subgraph, x: Tensor) -> Tensor:
        return a(x) if bool(p > 0) else x * 2

    weight = w()
    with pytest.raises(CaptureError, match="closes over 'weight', which requires a gradient"):
        aot_function(lambda x: choose(x.sum(), lambda y: y * weight, x), lambda graph, _: graph)(x())


def test_a_scripted_module_decomposes_rather_than_lose_a_gradient() -> None:
    once = define_once()
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.script"):
        module = torch.jit.script(torch.nn.Linear(3, 3))

    def step(x: Tensor) -> object:
        return torch.autograd.grad(once(module, x).sum(), [x, module.weight])

    with pytest.warns(HopkitWarning, match="neither an operand nor a capture"):
        graph = record(step, x())
    same(graph(x()), plainly(step, x()))
