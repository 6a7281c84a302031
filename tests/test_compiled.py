"""torch.compile as it is used: real models, an optimizer, checkpointing, sizes, and Inductor's other ways to compile.

Everything is compared with the same model where nothing of hopkit is called, values and gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd, lookup_backend
from torch._inductor import config
from torch.utils.checkpoint import checkpoint

import hopkit
from hopkit import Subgraph
from hopkit._torch.inductor import written
from tests import models
from tests.recording import define_once, define_twice, plainly, same, trained

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's, of its own code
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
    loss.backward()  # type: ignore[no-untyped-call] # torch's own
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
    got, code = written(lambda: step(model, torch.compile(model, fullgraph=True), TOKENS))
    same(got, step(plain, plain, TOKENS))
    assert regions(code) == ["model_two_forward", "model_two_backward"]


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
    "other code": lambda op, x, w: op(lambda y: (y @ w).sin(), op(lambda y: (y @ w).cos(), x)),
    "other numbers": lambda op, x, w: op(lambda y: (y @ w) * 2, op(lambda y: (y @ w) * 2.0, op(lambda y: (y @ w) * 3, x))),
    "other sizes": lambda op, x, w: op(lambda y: y.sin() @ w[:2, :2], op(lambda y: y.sin() @ w, x)[:, :2]),
    "other layouts": lambda op, x, w: op(lambda y: (y @ w).sin(), op(lambda y: (y @ w).sin(), x).t()),
    "nested": lambda op, x, w: op(lambda y: op(lambda z: (z @ w).sin(), y) + op(lambda z: (z @ w).sin(), y * 2), x),
    "only one needs a gradient": lambda op, x, w: op(lambda y: y @ w.detach(), x.detach()) + op(lambda y: y @ w, x),
    "two outputs": lambda op, x, w: sum(op(lambda y: ((y @ w).sin(), y.argmax(0)), x)),
    "one of them unused": lambda op, x, w: op(lambda y: (y @ w, y.exp()), op(lambda y: (y @ w, y.exp()), x)[0])[1],
}


@pytest.mark.parametrize("name", OUTLINED)
def test_outlined(name: str) -> None:
    op = define_region()
    check(lambda x, w: OUTLINED[name](op, x, w))
    torch.compiler.reset()
    with torch.no_grad():
        same(torch.compile(lambda x, w: OUTLINED[name](op, x, w), fullgraph=True)(X, W), OUTLINED[name](op, X, W))


def test_outlined_with_sizes_that_change() -> None:
    model, plain = pair(models.Gpt, models.single(outline=True))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (6, 9):
        same(step(model, compiled, TOKENS[:, :length]), step(plain, plain, TOKENS[:, :length]))


def test_outlined_with_random_numbers() -> None:
    op = define_region()

    def run(x: Tensor) -> Tensor:
        return cast("Tensor", op(lambda y: torch.rand_like(y), x) - op(lambda y: torch.rand_like(y), x))

    difference = torch.compile(run, fullgraph=True)(torch.zeros(100))
    assert difference.abs().max() > 0.5  # one code, and not the same numbers

    def noisy(x: Tensor) -> Tensor:
        return cast("Tensor", op(lambda y: nn.functional.dropout(y, 0.5), op(lambda y: nn.functional.dropout(y, 0.5), x)))

    (x,) = leaves(torch.ones(100))
    result = torch.compile(noisy, fullgraph=True)(x)
    result.sum().backward()
    same(x.grad, result)  # backward drops what forward dropped


# -- CompiledAutograd ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["eager", "aot_eager"])
def test_compiled_autograd(forward: str) -> None:
    twice = define_twice()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return twice(lambda y: (y @ w).sin(), x).square().sum()

    want = plainly(trained(run), *leaves())
    x, w = leaves()
    function = torch.compile(run, backend=forward, fullgraph=True) if forward != "eager" else run
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager", fullgraph=True)):
        result = function(x, w)
        (result * 0.5).backward()
    same([result, [x.grad, w.grad]], want)


def test_compiled_autograd_of_a_kernel_written_by_hand() -> None:
    once = define_once()

    @once.rule("device", device="cpu")
    def kernel(body: Subgraph, *xs: Tensor) -> Tensor:
        return body(*xs).clone()

    x, w = leaves()
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
        once(lambda y: (y @ w).sin(), x).sum().backward()
    same([x.grad, w.grad], trained(lambda x, w: (x @ w).sin().sum())(*leaves())[1] if False else _plain_slopes())


def _plain_slopes() -> list[Tensor | None]:
    x, w = leaves()
    (x @ w).sin().sum().backward()  # type: ignore[no-untyped-call] # torch's own
    return [x.grad, w.grad]
