"""Control flow in graphs that train, where a function detaches a part or draws random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, nop  # type: ignore[import-untyped] # torch's own
from hopkit_controlflow import associative_scan, checkpoint, cond, fori_loop, map, scan, switch, while_loop
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torchs

import hopkit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),  # torch's, of its own code
]

Part = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[Tensor, Tensor], Tensor]

X = torch.linspace(-1, 1, 12).reshape(4, 3)
W = torch.linspace(0.5, 1.5, 3)

OPS: dict[str, Callable[[Part, Tensor, Tensor], Tensor]] = {
    "cond": lambda f, x, w: cond(x.sum() > -9, lambda x: f(x, w), lambda x: x * 2, (x,)),
    "switch": lambda f, x, w: switch((x.sum() > -9).long(), (lambda x: x * 2, lambda x: f(x, w)), x),
    "while_loop": lambda f, x, w: while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, f(y, w)), (torch.tensor(0), x))[
        1
    ],
    "fori_loop": lambda f, x, w: fori_loop(0, 3, lambda i, y: f(y, w), x),
    "scan": lambda f, x, w: scan(lambda c, y: (f(c, w), f(y, w) * c), torch.ones(3), x)[1],
    "map": lambda f, x, w: map(lambda y: f(y, w), x),
    "associative_scan": lambda f, x, w: associative_scan(lambda a, b: f(a, w) + b, x, 0),
}


def detached(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (x * w).sin()
    return x * scale + (x * w).detach() * w.cos()


def drawn(x: Tensor, w: Tensor) -> Tensor:
    return dropout(x * w, 0.3) * torch.rand_like(x)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return X.clone().requires_grad_(), W.clone().requires_grad_()


def derived(run: Run, x: Tensor, w: Tensor, *, twice: bool = False) -> tuple[Tensor, ...]:
    y = run(x, w)
    first = torch.autograd.grad(y.sin().sum(), (x, w), create_graph=twice)
    return y.detach(), *(torch.autograd.grad((first[0] * x).sin().sum(), (x, w)) if twice else first)


def recorded(run: Run, *, twice: bool = False) -> tuple[Tensor, ...]:
    graph = make_fx(lambda x, w: derived(run, x, w, twice=twice))(*inputs())
    result: tuple[Tensor, ...] = graph(*inputs())
    return result


@pytest.mark.parametrize("part", [detached, drawn])
@pytest.mark.parametrize("op", OPS)
def test_its_gradients_are_those_of_eager(op: str, part: Part) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return OPS[op](part, x, w)

    torch.compiler.reset()
    want = derived(run, *inputs())
    assert_close(recorded(run), want)
    assert_close(derived(torch.compile(run, backend="aot_eager", fullgraph=True), *inputs()), want)


@pytest.mark.parametrize("op", ["cond", "while_loop", "scan"])
def test_its_second_derivatives_are_those_of_eager(op: str) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return OPS[op](lambda x, w: drawn(x, w) + detached(x, w), x, w)

    assert_close(recorded(run, twice=True), derived(run, *inputs(), twice=True))


def test_inductor_draws_the_same_in_backward() -> None:
    """As torch's own cond, while_loop and map do not (2.13, 2.14)."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        x = cond(x.sum() > 0, lambda x: dropout(x), lambda x: x * 2, (x,))
        x = while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, dropout(x, 0.3)), (torch.tensor(0), x))[1]
        return map(lambda x: dropout(x, 0.3), x)

    x = torch.ones(8, 32).requires_grad_()
    y = torch.compile(run, fullgraph=True)(x, W)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert 0 < y.count_nonzero() < y.numel()
    assert_close(gradient, y.detach())  # all of it is linear, and x is one


def test_what_comes_after_is_drawn_as_in_eager() -> None:
    """Backward draws again, and leaves the generator as it was."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        return OPS["cond"](drawn, x, w)

    graph = make_fx(lambda x, w: derived(run, x, w))(*inputs())
    graph(*inputs())
    after = torch.rand(3)
    derived(run, *inputs())
    assert torch.equal(after, torch.rand(3))


def test_what_is_drawn_from_a_generator_of_its_own_is_refused() -> None:
    generator = torch.Generator()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return OPS["cond"](lambda x, w: x * w * torch.rand(3, generator=generator), x, w)

    with pytest.raises(RuntimeError, match="draws from a generator of its own"):
        recorded(run)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: fori_loop(0, 3, lambda i, s: (s[1] * w, s[0] + s[1]), (x, x))[0],
        lambda x, w: while_loop(lambda a, b: a.abs().sum() < 50, lambda a, b: (a * 2, b + a * w), (x, x))[1],
        lambda x, w: scan(lambda c, y: ((c[0] * y, c[1] + y), c[0] * c[1]), (w, w), x)[1],
    ],
    ids=["fori_loop", "while_loop", "scan"],
)
def test_a_tensor_that_is_twice_in_the_state(run: Run) -> None:
    """After a step it is two: recorded as one, the graph did not fit."""
    assert_close(recorded(run), derived(run, *inputs()))


def test_one_without_gradients_within_another() -> None:
    """It is a node in the graph of the outer one, and its result has no gradient."""

    def inner(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            scale = OPS["cond"](lambda x, w: x * w, x, w)
        return scale * x * w

    def run(x: Tensor, w: Tensor) -> Tensor:
        return OPS["cond"](inner, x, w)

    assert_close(recorded(run), derived(run, *inputs()))
    assert_close(derived(torch.compile(run, backend="aot_eager", fullgraph=True), *inputs()), derived(run, *inputs()))


def test_what_cannot_be_a_node_is_never_a_graph_of_stand_ins() -> None:
    """Exported with one without gradients in it, strictly, it gave what was in memory."""

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            def inner(x: Tensor, w: Tensor) -> Tensor:
                with torch.no_grad():
                    return OPS["cond"](lambda x, w: x * w, x, w)

            return OPS["cond"](inner, x, w) * w

    with pytest.raises(hopkit.DataDependentError, match="cannot run here"):
        torch.export.export(Model(), (X, W), strict=True)


def _plain(op: str, f: Callable[[Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    if op == "scan":
        carry, found = w[0], []
        for y in x:
            carry = f(carry) * y
            found.append(f(y) + carry)
        return torch.stack(found)
    for _ in range(1 if op == "cond" else 2):
        x = f(x)
    return x


def _ours(op: str, f: Callable[[Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    def step(carry: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        carry = f(carry) * y
        return carry, f(y) + carry

    found: dict[str, Callable[[], Tensor]] = {
        "scan": lambda: scan(step, w[0], x)[1],
        "cond": lambda: cond(x.sum() > -9, f, lambda x: x * 2, (x,)),
        "while_loop": lambda: while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, f(x)), (torch.tensor(0), x))[1],
    }
    return found[op]()


@pytest.mark.parametrize("op", ["cond", "while_loop", "scan"])
def test_autocast_in_backward_is_that_of_plain_code(op: str) -> None:
    """Backward runs outside it, and computes a step again as forward computed it: the products are of bfloat16."""
    w = torch.linspace(-1, 1, 9).reshape(3, 3)

    def gradients(run: Callable[..., Tensor], compiled: bool) -> tuple[Tensor, ...]:
        def cast(x: Tensor, w: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(op, lambda x: (x @ w).tanh() + x, x, w)

        leaves = X.clone().requires_grad_(), w.clone().requires_grad_()
        y = (torch.compile(cast, backend="aot_eager", fullgraph=True) if compiled else cast)(*leaves)
        return y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)

    torch.compiler.reset()
    got, want = gradients(_ours, compiled=True), gradients(_plain, compiled=False)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for value, expected in zip(got, want, strict=True):
        assert_close(value, expected, rtol=1e-2, atol=1e-2)  # of a sum over steps the order may be another
    exact = gradients(lambda *args: _plain(*args).float(), compiled=False)
    assert torch.equal(got[0].float(), exact[0].float())


def test_a_part_that_trains_and_draws_within_control_flow_is_refused() -> None:
    def dropped(y: Tensor) -> Tensor:
        return dropout(y * W)

    def run(x: Tensor) -> Tensor:
        result: Tensor = cond(x.sum() > -9, lambda x: checkpoint(dropped, x), lambda x: x * 2, (x,))
        return result

    x, _ = inputs()
    with pytest.raises(hopkit.errors.AutogradError, match="draws random numbers and trains, inside what trains"):
        aot_function(run, nop)(x)
    with hopkit.decompose(checkpoint):
        y = aot_function(run, nop)(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert_close(slope, (y != 0) * 2 * W)


def test_what_draws_and_is_trained_is_not_flattened() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return OPS["cond"](drawn, x, w)

    graph = make_fx(lambda x, w: derived(run, x, w))(*inputs())
    with pytest.raises(hopkit.errors.AutogradError, match="was to be recorded without the op's node"):
        hopkit.flatten(graph)


def _saved(*_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


@pytest.mark.filterwarnings("ignore:.*context_fn is passed")  # torch's own word on every policy that is compiled
@pytest.mark.parametrize(
    ("op", "policy", "backend"),
    [
        *((op, policy, "aot_eager") for op in ("cond", "while_loop", "scan") for policy in (None, _saved)),
        ("cond", None, "inductor"),
        ("while_loop", _saved, "inductor"),
    ],
)
def test_in_a_checkpoint_that_is_compiled(op: str, policy: Callable[..., object] | None, backend: str) -> None:
    # torch's own have no rule for it, and an op that decides on values cannot be looked into.
    chosen: dict[str, Any] = {}
    if policy:
        chosen["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)

    def run(x: Tensor, w: Tensor) -> Tensor:
        y: Tensor = torchs(lambda x: OPS[op](detached, x.sin(), w), x, use_reentrant=False, **chosen)
        return y.cos()

    torch.compiler.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for sign in (1, -20):
        x, w = inputs()
        x = (x.detach() * sign).requires_grad_()
        assert_close(derived(compiled, x, w), derived(run, x, w))
