"""``cond`` and ``switch``: one way is gone, and every mode knows of the others."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hopkit_controlflow import cond, switch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hopkit import Op

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own use

X = torch.linspace(-1, 1, 6).reshape(2, 3)
W = torch.linspace(0.5, 1.5, 3)
YES = torch.tensor(True)

Function = Callable[..., Any]


def chosen(x: Tensor, w: Tensor = W) -> Any:
    return cond(x.sum() > 0, lambda x: x.sin() + w, lambda x: x**3 - w, (x,))


def plain(x: Tensor, w: Tensor = W) -> Tensor:
    return x.sin() + w if x.sum() > 0 else x**3 - w


def nodes(graph: torch.fx.GraphModule, op: Op[..., object] = cond) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=op.operator))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_recorded_it_is_one_node_of_two_graphs(mode: Any) -> None:
    graph = make_fx(lambda x: chosen(x), tracing_mode=mode)(X)
    assert nodes(graph) == 1
    for x in (X + 1, X - 1):
        assert_close(graph(x), plain(x))
    assert mode != "symbolic" or assert_close(graph(torch.ones(5, 3)), plain(torch.ones(5, 3))) is None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_gradients_of_operands_and_captures(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(chosen, backend=backend, fullgraph=True)
    for shift in (1.0, -1.0):
        (x, w), (y, v) = ((t.clone().requires_grad_() for t in (X + shift, W)) for _ in range(2))
        compiled(x, w).cos().sum().backward()
        plain(y, v).cos().sum().backward()
        assert_close([x.grad, w.grad], [y.grad, v.grad])


def test_the_branch_that_is_not_taken_gives_no_gradient() -> None:
    x, w, v = X.clone().requires_grad_(), W.clone().requires_grad_(), W.clone().requires_grad_()
    cond(YES, lambda x: x * w, lambda x: x * v, (x,)).sum().backward()
    assert w.grad is not None
    assert v.grad is None


@pytest.mark.parametrize("strict", [False, True])
def test_exported_saved_and_loaded_it_still_decides(strict: bool) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(W.clone())

        def forward(self, x: Tensor) -> Any:
            return chosen(x, self.weight)

    sizes = {"x": {0: torch.export.Dim.DYNAMIC}}
    program, file = torch.export.export(Model(), (X,), strict=strict, dynamic_shapes=sizes), io.BytesIO()
    assert nodes(program.graph_module) == 1
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in (X + 1, X - 1, torch.ones(5, 3)):
        assert_close(loaded(x), plain(x))


BATCHES: dict[str, Function] = {
    "vmap": vmap,
    "of grad": lambda f: vmap(grad(lambda x: f(x).sum())),
    "grad of": lambda f: grad(lambda x: vmap(f)(x).sin().sum()),
    "of vmap": lambda f: lambda x: vmap(vmap(f, in_dims=1, out_dims=1))(x[..., None, :].expand(-1, -1, 2, 3)),
    "jvp": lambda f: lambda x: jvp(vmap(f), (x,), (x.cos(),)),
    "jacrev": lambda f: vmap(jacrev(f)),
    "jacfwd": lambda f: vmap(jacfwd(f)),
    "hessian": lambda f: vmap(hessian(lambda x: f(x).sum())),
}


def each(x: Tensor, w: Tensor = W) -> Tensor:
    """`plain`, chosen by every item."""
    return torch.where(x.sum() > 0, x.sin() + w, x**3 - w)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("how", ["eager", "make_fx", "compile"])
def test_items_of_a_batch_decide_for_themselves(name: str, how: str) -> None:
    if (name, how) == ("hessian", "compile"):
        pytest.skip("torch compiles a batch of Hessians of no code")
    torch.compiler.reset()
    batch, others = torch.stack([X + 1, X - 1, X + 0.1]), torch.stack([X - 1, X - 1, X + 2])
    function = run = BATCHES[name](chosen)
    if how == "make_fx":
        run = make_fx(lambda x: function(x))(batch)
        assert nodes(run) > 0
    if how == "compile":
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    for x in (batch, others):
        assert_close(run(x), BATCHES[name](each)(x))


def test_a_batch_of_operands_alone_goes_one_way() -> None:
    gone = list[str]()

    def noted(name: str) -> Function:
        def branch(x: Tensor) -> Tensor:
            gone.append(name)
            return x * 2

        return branch

    assert_close(vmap(lambda x: cond(torch.tensor(1), noted("yes"), noted("no"), (x,)))(X), X * 2)
    assert gone in (["yes"], ["yes", "no", "yes"])  # looked at once


def test_second_derivatives_recorded() -> None:
    def step(x: Tensor, w: Tensor) -> Any:
        first = torch.autograd.grad(chosen(x, w).sum(), (x, w), create_graph=True)
        return first, torch.autograd.grad(first[0].sin().sum() + first[1].sin().sum(), x)

    def plainly(x: Tensor, w: Tensor) -> Any:
        first = torch.autograd.grad(plain(x, w).sum(), (x, w), create_graph=True)
        return first, torch.autograd.grad(first[0].sin().sum() + first[1].sin().sum(), x)

    graph = make_fx(step)((X + 1).requires_grad_(), W.clone().requires_grad_())
    assert nodes(graph) == 3
    for shift in (1.0, -1.0):
        x, w = (X + shift).requires_grad_(), W.clone().requires_grad_()
        assert_close(graph(x, w), plainly(x, w))


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.t(), lambda x: x[0], lambda x: x.view(-1)])
def test_what_comes_out_is_its_own(make: Function) -> None:
    x = X.clone()
    recorded = make_fx(lambda x: cond(x.sum() > 0, make, make, (x,)))(X)
    compiled = torch.compile(lambda x: cond(x.sum() > 0, make, make, (x,)), backend="aot_eager", fullgraph=True)
    runs: list[Function] = [lambda x: cond(YES, make, make, (x,)), recorded, compiled]
    for run in runs:
        y = run(x)
        assert y.is_contiguous()
        y.add_(1)
        assert_close(x, X)


def test_two_outputs_do_not_share_memory() -> None:
    y, z = cond(YES, lambda x: ((y := x + 1), y), lambda x: (x + 1, x + 1), (X,))
    y.zero_()
    assert_close(z, X + 1)


def test_a_predicate_may_be_a_number_or_a_size() -> None:
    graph = make_fx(lambda x: cond(x.shape[0] > 2, torch.sin, torch.cos, (x,)), tracing_mode="symbolic")(X)
    assert_close(graph(X), X.cos())
    assert_close(cond(0, torch.sin, torch.cos, [X]), X.cos())
    assert_close(cond(torch.tensor([[2.5]]), torch.sin, torch.cos, (X,)), X.sin())


def test_inside_each_other() -> None:
    def nested(x: Tensor) -> Any:
        return cond(
            x[0].sum() > 0, lambda x: chosen(x) + 1, lambda x: switch(x.sum() > -9, (torch.exp, chosen), x), (x,)
        )

    def plainly(x: Tensor) -> Tensor:
        return plain(x) + 1 if x[0].sum() > 0 else (plain(x) if x.sum() > -9 else x.exp())

    graph = make_fx(lambda x: nested(x))(X)
    batch = torch.stack([X + 2, X, X - 1, X - 9])
    for x in batch:
        assert_close([nested(x), graph(x)], [plainly(x)] * 2)
        assert_close(grad(lambda x: nested(x).sum())(x), grad(lambda x: plainly(x).sum())(x))
    assert_close(vmap(nested)(batch), torch.stack(list(map(plainly, batch))))


def test_floating_point_operations_of_the_branch_that_is_taken() -> None:
    square = torch.eye(4)
    with FlopCounterMode(display=False) as counted:
        cond(YES, lambda x: x @ x @ x, lambda x: x @ x, (square,))
    assert counted.get_total_flops() == 2 * 2 * 4**3


def test_as_torch_has_it() -> None:
    for shift in (1.0, -1.0):
        found = []
        for op in (cond, torch.cond):
            x, w = (X + shift).requires_grad_(), W.clone().requires_grad_()
            tree = op(
                x.sum() > 0,
                lambda t: {"a": t["x"].sin() * w, "b": [t["x"].sum()]},  # noqa: B023
                lambda t: {"a": t["x"] ** 3 - w, "b": [t["x"].mean()]},  # noqa: B023
                ({"x": x},),
            )
            (tree["a"].sum() + tree["b"][0]).backward()
            found.append((tree, x.grad, w.grad))
        assert_close(*found)


@pytest.mark.parametrize("index", [-3, 0, 1, 2, 9])
@pytest.mark.parametrize("of", [int, torch.tensor, lambda i: torch.tensor([i])])
def test_an_index_outside_is_the_first_or_the_last(index: int, of: Function) -> None:
    branches = (torch.sin, torch.cos, torch.exp)
    want = branches[max(0, min(index, 2))](X)
    assert_close(switch(of(index), branches, X), want)
    assert_close(make_fx(lambda x: switch(of(index), branches, x))(X)(X), want)


def test_every_item_has_its_index() -> None:
    branches, index = (torch.sin, lambda x: x * W, torch.exp), torch.tensor([-1, 0, 1, 2, 7])
    batch = torch.stack([X] * 5)
    run = vmap(lambda i, x: switch(i, branches, x))
    want = torch.stack([X.sin(), X.sin(), X * W, X.exp(), X.exp()])
    graph = make_fx(lambda i, x: run(i, x))(index.flip(0), batch)
    assert nodes(graph, switch) == 1
    assert_close([run(index, batch), graph(index, batch)], [want] * 2)
