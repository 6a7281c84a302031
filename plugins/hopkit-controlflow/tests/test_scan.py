"""``scan``, ``map`` and ``associative_scan``: along a sequence, with one graph for all of its steps."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import hopkit_controlflow
import pytest
import torch
from hopkit_controlflow import associative_scan, scan
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hopkit import Op
from hopkit.extend.body import leaves

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own use

each = hopkit_controlflow.map

XS = torch.linspace(-1, 1, 12).reshape(4, 3)
H = torch.linspace(0.1, 0.5, 3)
W = torch.linspace(-0.5, 0.5, 9).reshape(3, 3)

Function = Callable[..., Any]


def recurrent(h: Tensor, xs: Tensor, w: Tensor = W) -> Any:
    """Two states, and two outputs of each step."""

    def step(state: tuple[Tensor, Tensor], x: Tensor) -> Any:
        h, c = state
        c = c * x.sigmoid() + (h @ w).tanh()
        return (c.tanh() * x, c), {"h": h, "norm": c.square().sum()}

    return scan(step, (h, h + 1), xs)


def recurrent_plainly(h: Tensor, xs: Tensor, w: Tensor = W) -> Any:
    c, hs, norms = h + 1, [], []
    for x in xs:
        c = c * x.sigmoid() + (h @ w).tanh()
        hs.append(h)
        norms.append(c.square().sum())
        h = c.tanh() * x
    return (h, c), {"h": torch.stack(hs), "norm": torch.stack(norms)}


def mapped(h: Tensor, xs: Tensor, w: Tensor = W) -> Any:
    return each(lambda x, h: (x @ w + h, x.sum()), xs, h)


def mapped_plainly(h: Tensor, xs: Tensor, w: Tensor = W) -> Any:
    return torch.stack([x @ w + h for x in xs]), torch.stack([x.sum() for x in xs])


def linear(h: Tensor, xs: Tensor, w: Tensor = W) -> Any:
    """The states of ``s = s * x + h``, all at once."""

    def after(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return a[0] * b[0], a[1] * b[0] + b[1] + 0 * w[0]

    return associative_scan(after, (xs, h.expand(xs.shape)), 0)


def linear_plainly(h: Tensor, xs: Tensor, w: Tensor = W) -> Any:
    by, plus = [xs[0]], [h]
    for x in xs[1:]:
        by.append(by[-1] * x)
        plus.append(plus[-1] * x + h + 0 * w[0])
    return torch.stack(by), torch.stack(plus)


OPS: dict[str, tuple[Op[..., object], Function, Function]] = {
    "scan": (scan, recurrent, recurrent_plainly),
    "map": (each, mapped, mapped_plainly),
    "associative_scan": (associative_scan, linear, linear_plainly),
}

ops = pytest.mark.parametrize(("op", "run", "plain"), OPS.values(), ids=OPS)


def nodes(graph: torch.fx.GraphModule, op: Op[..., object]) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=op.operator))


def size(graph: torch.fx.GraphModule) -> int:
    return sum(len(m.graph.nodes) for m in graph.modules() if isinstance(m, torch.fx.GraphModule))


def slopes(run: Function, *args: Tensor) -> Any:
    args = tuple(t.detach().clone().requires_grad_() for t in args)
    result = run(*args)
    return result, torch.autograd.grad(total(result), args, allow_unused=True, materialize_grads=True)


def total(result: object) -> Tensor:
    return torch.stack([t.cos().sum() for t in leaves(result) if isinstance(t, Tensor)]).sum()


@ops
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_recorded_it_is_one_node(op: Op[..., object], run: Function, plain: Function, mode: Any) -> None:
    graph = make_fx(lambda h, xs: run(h, xs), tracing_mode=mode)(H, XS)
    assert nodes(graph, op) == 1
    assert_close(graph(H, XS + 1), plain(H, XS + 1))
    if mode == "symbolic":
        longer = torch.linspace(-1, 1, 21).reshape(7, 3)
        assert_close(graph(H, longer), plain(H, longer))


@ops
def test_a_graph_does_not_grow_with_the_sequence(op: Op[..., object], run: Function, plain: Function) -> None:
    def graph(length: int) -> int:
        def step(h: Tensor, xs: Tensor) -> object:
            return torch.autograd.grad(total(run(h, xs)), (h, xs))

        return size(make_fx(step)(H.clone().requires_grad_(), torch.rand(length, 3).requires_grad_()))

    assert graph(3) == graph(300)


@ops
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_gradients(op: Op[..., object], run: Function, plain: Function, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for xs in (XS, XS.cos()):
        assert_close(slopes(compiled, H, xs, W), slopes(plain, H, xs, W))


@ops
@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_length_that_changes(op: Op[..., object], run: Function, plain: Function, strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, h: Tensor, xs: Tensor) -> object:
            return run(h, xs)

    sizes: Any = {"h": None, "xs": {0: torch.export.Dim.DYNAMIC}}
    program, file = torch.export.export(Model(), (H, XS), strict=strict, dynamic_shapes=sizes), io.BytesIO()
    assert nodes(program.graph_module, op) == 1
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for xs in (XS, torch.linspace(-1, 1, 21).reshape(7, 3)):
        assert_close(loaded(H, xs), plain(H, xs))


TRANSFORMS: dict[str, Function] = {
    "vmap": lambda f: lambda h, xs: vmap(f, in_dims=(0, None))(torch.stack([h, h + 1]), xs),
    "vmap of xs": lambda f: lambda h, xs: vmap(f, in_dims=(None, 1))(h, torch.stack([xs, xs + 1], 1)),
    "vmap of a capture": lambda f: lambda h, xs: vmap(lambda w: f(h, xs, w))(torch.stack([W, W + 1])),
    "grad": lambda f: grad(lambda h, xs: total(f(h, xs)), argnums=(0, 1)),
    "grad of a capture": lambda f: lambda h, xs: grad(lambda w: total(f(h, xs, w)))(W),
    "grad grad": lambda f: lambda h, xs: grad(lambda h: grad(lambda xs: total(f(h, xs)))(xs).sin().sum())(h),
    "jvp": lambda f: lambda h, xs: jvp(lambda xs: f(h, xs), (xs,), (xs.cos(),)),
    "jacrev": lambda f: lambda h, xs: jacrev(lambda h: f(h, xs)[1])(h),
    "vmap grad": lambda f: lambda h, xs: vmap(grad(lambda h: total(f(h, xs))))(torch.stack([h, h + 1])),
}


@ops
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("how", ["eager", "make_fx", "compile"])
def test_transforms(op: Op[..., object], run: Function, plain: Function, name: str, how: str) -> None:
    torch.compiler.reset()
    function = transformed = TRANSFORMS[name](run)
    if how == "make_fx":
        transformed = make_fx(lambda h, xs: function(h, xs))(H, XS)
        assert nodes(transformed, op) > 0
    if how == "compile":
        transformed = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    assert_close(transformed(H, XS + 1), TRANSFORMS[name](plain)(H, XS + 1))


@ops
def test_no_steps(op: Op[..., object], run: Function, plain: Function) -> None:
    graph = make_fx(lambda h, xs: run(h, xs), tracing_mode="symbolic")(H, XS)
    for found in (run(H, XS[:0]), graph(H, XS[:0])):
        shapes = [tuple(t.shape) for t in leaves(found) if isinstance(t, Tensor)]
        assert (
            shapes
            == {
                "controlflow_scan": [(3,), (3,), (0, 3), (0,)],
                "controlflow_map": [(0, 3), (0,)],
                "controlflow_associative_scan": [(0, 3), (0, 3)],
            }[op.spec.name]
        )
    state, _ = scan(lambda h, x: (h + x, x), H, XS[:0])
    assert_close(state, H)
    state.zero_()
    assert H.sum() > 0


@pytest.mark.parametrize("length", range(1, 18))
def test_every_length_of_an_associative_scan(length: int) -> None:
    xs = torch.linspace(0.5, 1.5, length)
    assert_close(associative_scan(torch.mul, xs, 0), xs.cumprod(0))
    assert_close(associative_scan(torch.mul, xs, 0, reverse=True), xs.flip(0).cumprod(0).flip(0))


def test_the_order_of_what_is_combined() -> None:
    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    matrices, products = torch.linspace(-1, 1, 28).reshape(7, 2, 2), list[Tensor]()
    for matrix in matrices:
        products.append(products[-1] @ matrix if products else matrix)
    assert_close(associative_scan(matmul, matrices, 0), torch.stack(products))


def test_floating_point_operations_of_every_step() -> None:
    square = torch.eye(4)
    with FlopCounterMode(display=False) as counted:
        scan(lambda c, x: (c @ x, c), square, torch.stack([square] * 3))
        each(lambda x: x @ x, torch.stack([square] * 3))
    assert counted.get_total_flops() == 6 * 2 * 4**3


def test_within_each_other() -> None:
    def run(h: Tensor, xs: Tensor) -> Any:
        return scan(lambda c, x: (c + each(lambda y: y * c.sum(), x).sum(), mapped(c, x[None])), h, xs)

    def plainly(h: Tensor, xs: Tensor) -> Any:
        first, second = [], []
        for x in xs:
            a, b = mapped_plainly(h, x[None])
            h = h + (x * h.sum()).sum()
            first.append(a)
            second.append(b)
        return h, (torch.stack(first), torch.stack(second))

    graph = make_fx(lambda h, xs: run(h, xs))(H, XS)
    assert_close([run(H, XS + 1), graph(H, XS + 1)], [plainly(H, XS + 1)] * 2)


def test_a_counted_loop_with_concatenated_outputs() -> None:
    """As others wrote it by hand: ``body(i, *state)`` gives ``(going, *state, *outputs)``, trips are a tensor."""

    def loop(trips: Tensor, going: Tensor, body: Function, state: Tensor, most: int) -> tuple[Tensor, Tensor]:
        def step(carry: Any, i: Tensor) -> Any:
            going, count, state = carry
            going = going & (i < trips)
            still, after, output = body(i, state)
            state = torch.where(going, after, state)
            return (going & still, count + going, state), output

        (_, count, state), outputs = scan(step, (going, torch.tensor(0), state), torch.arange(most))
        return state, outputs[: int(count)].flatten(0, 1)

    def body(i: Tensor, x: Tensor) -> Any:
        return x.sum() < 40, x * 2 + i, x.cos()

    for trips in (0, 2, 8):
        x, outputs, going, i = torch.ones(3), list[Tensor](), True, 0
        while going and i < trips:
            still, after, output = body(torch.tensor(i), x)
            outputs.append(output)
            x, going, i = after, bool(still), i + 1
        want = torch.cat(outputs) if outputs else torch.empty(0)
        assert_close(loop(torch.tensor(trips), torch.tensor(True), body, torch.ones(3), 8), (x, want))


def test_memory_for_gradients_is_linear_in_the_sequence() -> None:
    def saved(length: int) -> int:
        count = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal count
            count += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            recurrent(H.clone().requires_grad_(), torch.rand(length, 3))
        return count

    one, two, three = (saved(n) for n in (10, 20, 30))
    assert three - two == two - one
