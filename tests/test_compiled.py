"""torch.compile as it is used: real models, an optimizer, checkpointing, sizes, and Inductor's other ways to compile.

Everything is compared with the same model where nothing of hopkit is called, values and gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hopkit
from hopkit import Subgraph
from hopkit._torch.inductor import compiled_backward, counting, set_up, varies, written
from tests import models
from tests.recording import define_once, define_twice, nodes, plainly, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    # torch's, of its own code
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
]

X = torch.linspace(-1.0, 1.0, 16).reshape(4, 4)
W = torch.linspace(0.5, 1.5, 16).reshape(4, 4)
TOKENS = torch.arange(32).reshape(2, 16) % 7


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors or (X, W)]


def check(function: Callable[..., object], *inputs: Tensor, **how: Any) -> None:
    """A compiled function has the values and gradients of the plain bodies, random numbers included."""
    compiled = torch.compile(function, fullgraph=True, **how)
    torch.manual_seed(0)
    want = plainly(trained(function), *leaves(*inputs))
    torch.manual_seed(0)
    same(trained(compiled)(*leaves(*inputs)), want)


# -- real models -----------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[..., models.Through]] = {"single": models.single, "composite": models.composite}


def step(model: nn.Module, function: Callable[[Tensor], Tensor], given: Tensor) -> list[Tensor | None]:
    """The loss and the gradients of one training step."""
    model.zero_grad()
    loss = function(given).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def pair(make: Callable[..., nn.Module], through: models.Through, layers: int = 2) -> tuple[nn.Module, nn.Module]:
    """The same model twice: through an op, and plain."""
    torch.manual_seed(0)
    model, plain = make(layers, through), make(layers, models.inline)
    plain.load_state_dict(model.state_dict())
    return model, plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_transformer_trains(form: str, backend: str) -> None:
    model, plain = pair(models.Gpt, FORMS[form]())
    same(step(model, torch.compile(model, backend=backend, fullgraph=True), TOKENS), step(plain, plain, TOKENS))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_residual_network_trains(backend: str) -> None:
    model, plain = pair(models.ResNet, models.single())
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(step(model, compiled, images), step(plain, plain, images), rtol=1e-4, atol=1e-5)


def test_an_optimizer_steps_as_without_the_op() -> None:
    model, plain = pair(models.Gpt, models.single(), layers=1)
    losses: list[list[Tensor]] = []
    for trainee in (model, plain):
        optimizer = torch.optim.SGD(trainee.parameters(), lr=0.1)
        run = torch.compile(trainee, backend="aot_eager", fullgraph=True)
        losses.append([])
        for _ in range(3):
            losses[-1].append(cast("Tensor", step(trainee, run, TOKENS)[0]))
            optimizer.step()
    same(losses[0], losses[1])
    same(list(model.parameters()), list(plain.parameters()))


# -- outlined regions ------------------------------------------------------------------------------------------------


def regions(code: str) -> list[str]:
    """The functions that Inductor wrote for regions."""
    return re.findall(r"^def ((?:model|t)_\w+)\(", code, flags=re.MULTILINE)


def test_layers_of_an_outlined_transformer_share_their_code() -> None:
    model, plain = pair(models.Gpt, models.composite(outline=True), layers=3)
    with torch.no_grad():
        got, code = written(torch.compile(model, fullgraph=True), TOKENS)
        same(got, plain(TOKENS))
    assert regions(code) == ["model_two_region"]


def test_layers_of_an_outlined_residual_network_share_their_code() -> None:
    """Outside of regions Inductor gives convolutions a layout of its own."""
    model, plain = pair(models.ResNet, models.single(outline=True), layers=3)
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    got, code = written(lambda: step(model, torch.compile(model, fullgraph=True), images))
    torch.testing.assert_close(got, step(plain, plain, images), rtol=1e-4, atol=1e-5)
    assert regions(code) == ["model_block_forward", "model_block_backward"]


def define_region() -> Any:
    @hopkit.define("t_region", outline=True)
    def region(body: Subgraph, *xs: Tensor) -> Any:
        return body(*xs)

    return region


OUTLINED: dict[str, Callable[[Any, Tensor, Tensor], object]] = {
    "other numbers": lambda op, x, w: op(
        lambda y: (y @ w) * 2, op(lambda y: (y @ w) * 2.0, op(lambda y: (y @ w) * 3, x))
    ),
    "other layouts": lambda op, x, w: op(lambda y: (y @ w).sin(), op(lambda y: (y @ w).sin(), x).t()),
    "nested": lambda op, x, w: op(lambda y: op(lambda z: (z @ w).sin(), y) + op(lambda z: (z @ w).sin(), y * 2), x),
    "side by side": lambda op, x, w: op(lambda y: (y @ w).sin(), x) + op(lambda y: (y @ w).sin(), x * 2),
    "one of them unused": lambda op, x, w: op(lambda y: (y @ w, y.exp()), op(lambda y: (y @ w, y.exp()), x)[0])[1],
}


@pytest.mark.parametrize("name", OUTLINED)
def test_outlined(name: str) -> None:
    op = define_region()
    check(lambda x, w: OUTLINED[name](op, x, w))


@pytest.mark.parametrize(("outline", "backend"), [(False, "aot_eager"), (True, "inductor")])
def test_sizes_that_change_are_compiled_once(outline: bool, backend: str) -> None:
    compiled: list[object] = []

    @hopkit.define("t_region", outline=outline)
    def region(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return region(lambda y: (y @ w).sin() + y.shape[0], region(lambda y: (y @ w).sin() + y.shape[0], x))

    function = torch.compile(run, backend=counting(backend, compiled), fullgraph=True, dynamic=True)
    for size in range(3, 9):
        inputs = leaves(torch.linspace(-1.0, 1.0, size * 4).reshape(size, 4), W)
        same(trained(function)(*inputs), plainly(trained(run), *inputs))
    assert len(compiled) == 1


def test_outlined_with_random_numbers() -> None:
    op = define_region()

    def run(x: Tensor) -> Tensor:
        return cast("Tensor", op(lambda y: torch.rand_like(y), x) - op(lambda y: torch.rand_like(y), x))

    difference = torch.compile(run, fullgraph=True)(torch.zeros(100))
    assert difference.abs().max() > 0.5  # one code, and not the same numbers

    def noisy(x: Tensor) -> Tensor:
        return cast(
            "Tensor", op(lambda y: nn.functional.dropout(y, 0.5), op(lambda y: nn.functional.dropout(y, 0.5), x))
        )

    (x,) = leaves(torch.ones(100))
    result = torch.compile(noisy, fullgraph=True)(x)
    result.sum().backward()
    same(x.grad, result)  # backward drops what forward dropped


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_floats_and_sizes_that_a_subgraph_fixes() -> None:
    """With ``dynamic=True`` Dynamo has a symbol for every float and size of a module, such as a layer norm's."""
    model, plain = pair(models.Gpt, models.composite(), layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (6, 9):
        same(step(model, compiled, TOKENS[:, :length]), step(plain, plain, TOKENS[:, :length]))


class Settings:
    """What several subgraphs close over."""

    scale = 0.5


FLOATS: dict[str, tuple[int, Callable[[Any, Any, Tensor], Tensor]]] = {
    "in two calls": (2, lambda f, g, x: f(lambda y: y.sin() * Settings.scale, x) + f(lambda y: y * Settings.scale, x)),
    "in two calls of a body": (1, lambda f, g, x: g(lambda y: y.sin() * Settings.scale, x)),
    "after a call": (1, lambda f, g, x: f(lambda y: y.sin() * Settings.scale, x) * Settings.scale),
    "before a call": (1, lambda f, g, x: f(lambda y: y * Settings.scale, x.sin() * Settings.scale)),
    "in an op in an op": (2, lambda f, g, x: g(lambda y: f(lambda z: z * Settings.scale, y).sin() * Settings.scale, x)),
    "decided on": (1, lambda f, g, x: f(lambda y: y.sin() if Settings.scale > 0.1 else y, x) * Settings.scale),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_float_at_one_place_that_several_look_up(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``dynamic=True`` the float may change; Dynamo knew it in the subgraph alone that looked first."""
    once, twice, graphs = define_once(), define_twice(), list[object]()
    count, case = FLOATS[name]

    def run(x: Tensor) -> Tensor:
        return case(once, twice, x)

    compiled = torch.compile(run, backend=counting(backend, graphs), fullgraph=True, dynamic=True)
    for value in (0.5, 0.75):
        monkeypatch.setattr(Settings, "scale", value)
        (x,) = leaves(X)
        same(trained(compiled)(x), plainly(trained(run), x))
    assert sum(nodes(cast("nn.Module", graphs[-1]), op) for op in (once, twice)) == count
    assert backend != "eager" or len(graphs) == 1  # AOTAutograd alone takes a float for a constant


def test_floats_that_change_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    twice, compiled = define_twice(), list[object]()

    def run(x: Tensor) -> Tensor:
        return twice(lambda y: y.sin() * Settings.scale, x * Settings.scale)

    function = torch.compile(run, backend=counting("inductor", compiled), fullgraph=True, dynamic=True)
    for value in (0.5, 0.75, 0.25):
        monkeypatch.setattr(Settings, "scale", value)
        (x,) = leaves(X)
        same(trained(function)(x), plainly(trained(run), x))
    assert len(compiled) == 1


def test_a_size_that_is_marked() -> None:
    once, graphs = define_once(), list[object]()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return once(lambda y: (y @ w).sin(), x)

    function = torch.compile(run, backend=counting("aot_eager", graphs), fullgraph=True)
    for size in (3, 5, 8):
        inputs = leaves(torch.linspace(-1.0, 1.0, size * 4).reshape(size, 4), W)
        varies(inputs[0], 0)
        same(trained(function)(*inputs), plainly(trained(run), *inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize(("outline", "backend"), [(False, "aot_eager"), (True, "inductor")])
def test_sizes_that_only_values_tell(outline: bool, backend: str) -> None:
    @hopkit.define("t_region", outline=outline)
    def region(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    def run(x: Tensor) -> Tensor:
        rows = x.abs().sum(1).nonzero().squeeze(1)
        return region(lambda y: y.sin() * 2, region(lambda y: y.sin() * 2, x[rows])) + 1

    with set_up(sizes_from_values=True):
        function = torch.compile(run, backend=backend, fullgraph=True)
        for x in (X, torch.cat([X, torch.zeros(2, 4)])):
            same(function(x), plainly(run, x))


# -- CompiledAutograd ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's, of what it traces
@pytest.mark.parametrize("forward", ["eager", "aot_eager"])
@pytest.mark.parametrize("kernel", [False, True])
def test_compiled_autograd(forward: str, kernel: bool) -> None:
    once = define_once()
    if kernel:
        once.rule("device", device="cpu")(lambda body, *xs: body(*xs).clone())

    def run(x: Tensor, w: Tensor) -> Tensor:
        return once(lambda y: (y @ w).sin(), x).square().sum()

    x, w = leaves()
    (x @ w).sin().square().sum().backward()
    want, x.grad, w.grad = [x.grad, w.grad], None, None
    function = torch.compile(run, backend=forward, fullgraph=True) if forward != "eager" else run
    with compiled_backward("aot_eager"):
        function(x, w).backward()
    same([x.grad, w.grad], want)


# -- checkpointing ---------------------------------------------------------------------------------------------------

CHECKPOINTED: dict[str, Callable[[Any, Callable[..., Tensor], Tensor], Any]] = {
    "around": lambda op, body, x: checkpoint(lambda a: op(body, a), x, use_reentrant=False),
    "inside": lambda op, body, x: op(lambda y: checkpoint(body, y, use_reentrant=False), x),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("backend", ["", "eager", "aot_eager"])
def test_checkpointing(name: str, backend: str) -> None:
    once = define_once()

    def run(x: Tensor, w: Tensor) -> object:
        p = 0.0 if backend == "eager" else 0.5  # torch's own checkpoint draws other numbers there
        return CHECKPOINTED[name](once, lambda y: nn.functional.dropout((y @ w).sin(), p) @ w, x)

    if backend:
        check(run, backend=backend)
        return
    torch.manual_seed(0)
    want = plainly(trained(run), *leaves())
    torch.manual_seed(0)
    same(trained(run)(*leaves()), want)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_checkpoint_computes_the_body_again_once(name: str) -> None:
    once, calls = define_once(), list[int]()

    def body(y: Tensor) -> Tensor:
        calls.append(1)
        return (y @ y).sin()

    (x,) = leaves(X)
    cast("Tensor", CHECKPOINTED[name](once, body, x)).sum().backward()
    assert len(calls) == 2


def test_checkpointing_under_inductor() -> None:
    once = define_once()
    check(
        lambda x, w: CHECKPOINTED["around"](
            once, lambda y: (y @ w).sin() @ w, CHECKPOINTED["inside"](once, torch.sin, x)
        )
    )


# -- functions of functions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_op_in_an_autograd_function(backend: str) -> None:
    once = define_once()

    class Tenfold(torch.autograd.Function):
        """A backward that is not the derivative, so that losing it shows."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return once(torch.sin, x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return once(torch.cos, x) * gradient * 10

    check(lambda x, w: Tenfold.apply(x * w) + 1, backend=backend)  # type: ignore[no-untyped-call] # torch's own


TRANSFORMED: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "vmap": lambda f, x: torch.vmap(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda v: f(v).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda v: f(v).sum()))(x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_an_op_under_a_transform_that_is_compiled(name: str) -> None:
    twice = define_twice()

    def run(x: Tensor) -> object:
        return TRANSFORMED[name](lambda v: twice(lambda y: y.sin() * 2, v), x)

    same(torch.compile(run, backend="aot_eager", fullgraph=True)(X), plainly(run, X))


# -- Inductor's other ways -------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], Mapping[str, Any]]] = {
    "cpp_wrapper": ({"cpp_wrapper": True}, {}),
    "freezing": ({"freezing": True}, {}),
    "reduce-overhead": ({}, {"mode": "reduce-overhead"}),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("outline", [False, True])
def test_another_way_to_compile(name: str, outline: bool) -> None:
    patch, how = WAYS[name]

    @hopkit.define("t_region", outline=outline)
    def region(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(W)

        def forward(self, x: Tensor) -> Tensor:
            return region(lambda y: (y @ self.weight).sin(), region(lambda y: (y @ self.weight).sin(), x))

    model = Model()
    with set_up(**patch), torch.no_grad():
        same(torch.compile(model, fullgraph=True, **how)(X), plainly(model, X))
