"""What a judge who had not written hopkit found silently wrong, or failing where plain PyTorch works; one test each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import aot_function, nop  # type: ignore[import-untyped] # it has no types
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import HopkitWarning, SpecError, Subgraph
from hopkit._torch.fakes import FakeMode
from tests.recording import define_once, same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.tensor([1.0, 2.0, -3.0, -4.0, -5.0])


def slope(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.autograd.grad(f(x).sum(), x)[0]


def leaf() -> Tensor:
    return X.clone().requires_grad_()


def test_a_size_that_only_values_tell_beside_a_known_one() -> None:
    @hopkit.define("t_both")
    def both(fn: Subgraph, x: Tensor) -> Tensor:
        return fn(x[x > 0]) + 10 * fn(x)

    def f(x: Tensor) -> Tensor:
        return both(lambda a: a.sum() * a.shape[0], x)

    same(make_fx(f)(X)(X), f(X))
    same(make_fx(slope(f))(leaf())(leaf()), slope(f)(leaf()))


def test_a_capture_that_is_used_inside_a_function_of_torch() -> None:
    once = define_once()

    def f(x: Tensor, w: Tensor) -> Tensor:
        loss = torch.nn.functional.triplet_margin_with_distance_loss
        return once(lambda a: loss(a, a + 1, a * 2, distance_function=lambda p, q: (p - q) * w), x)

    with pytest.warns(HopkitWarning, match="neither an operand nor a capture"):
        graph = make_fx(f)(X, X.clone())
    same(graph(X, X * 10), f(X, X * 10))


def test_a_body_that_closes_over_what_is_traced() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        @hopkit.define("t_weighted", replace=True)
        def weighted(fn: Subgraph, x: Tensor) -> Tensor:
            return w * fn(x)

        return weighted(torch.sin, x)

    with pytest.warns(HopkitWarning, match="neither an operand nor a capture"):
        graph = make_fx(f)(X, X.clone())
    same(graph(X, X * 10), X * 10 * X.sin())


def test_detach_by_another_name() -> None:
    once = define_once()
    step = slope(lambda x: once(lambda a: torch.ops.aten.detach(a) * a, x))
    same(make_fx(step)(leaf())(leaf()), X)


def test_a_subgraph_that_asks_whether_gradients_are_on() -> None:
    once = define_once()

    @torch.no_grad()
    def f(x: Tensor) -> Tensor:
        return once(lambda a: a * (2 if torch.is_grad_enabled() else 3), x)

    same(make_fx(f)(X)(X), X * 3)


def test_a_subgraph_that_asks_whether_a_tensor_requires_a_gradient() -> None:
    once = define_once()
    step = slope(lambda x: once(lambda a: a * 2 if a.requires_grad else a * 3, x))
    same(make_fx(step)(leaf())(leaf()), torch.full((5,), 2.0))


def test_an_op_whose_name_another_has_taken() -> None:
    @hopkit.define("t_taken")
    def old(fn: Subgraph, x: Tensor) -> Tensor:
        return fn(x)

    @hopkit.define("t_taken", replace=True)
    def new(fn: Subgraph, x: Tensor) -> Tensor:
        return 100 * fn(x)

    same(make_fx(lambda x: old(torch.sin, x))(X)(X), X.sin())
    same(make_fx(lambda x: new(torch.sin, x))(X)(X), 100 * X.sin())


def test_a_copy_into_a_tensor_under_aot_autograd() -> None:
    once = define_once()

    def first_from_second(a: Tensor) -> Tensor:
        b = a.clone()
        b[0] = a[1]
        return b * 2

    x = leaf()
    aot_function(lambda x: once(first_from_second, x), nop)(x).sum().backward()
    same(x.grad, torch.tensor([0.0, 4.0, 2.0, 2.0, 2.0]))


def test_a_capture_that_is_cast_under_aot_autograd() -> None:
    once = define_once()
    with pytest.warns(HopkitWarning, match="cannot be rehearsed"):
        got = aot_function(lambda x, w: once(lambda a: a * w.float(), x), nop)(X, X.double())
    same(got, X * X)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_a_body_that_differentiates(tracing_mode: str) -> None:
    @hopkit.define("t_force")
    @torch.enable_grad()
    def force(energy: Subgraph, x: Tensor) -> Tensor:
        z = x.detach().requires_grad_()
        return torch.autograd.grad(energy(z).sum(), z)[0]

    graph = make_fx(lambda x: force(torch.sin, x), tracing_mode=tracing_mode)(X)  # type: ignore[arg-type] # a literal
    same(graph(X), X.cos())


def test_a_write_to_an_operand_that_was_computed() -> None:
    once = define_once()

    def f(x: Tensor) -> Tensor:
        z = x * 2
        return once(lambda a: a.add_(1), z) + z

    with pytest.warns(HopkitWarning, match="in-place operation"):
        graph = make_fx(slope(f))(leaf())
    same(graph(leaf()), torch.full((5,), 4.0))


@pytest.mark.parametrize("name", ["_dir", "__init__"])
def test_names_that_torch_keeps_for_itself(name: str) -> None:
    with pytest.raises(SpecError, match="starts with an underscore"):

        @hopkit.define(name)
        def op(fn: Subgraph, x: Tensor) -> Tensor:
            return fn(x)


def test_autocast_that_sets_a_dtype_in_the_body() -> None:
    @hopkit.define("t_sum")
    def total(fn: Subgraph, x: Tensor) -> Tensor:
        return fn(x).sum()

    with FakeMode():
        x = torch.empty(4, 4, dtype=torch.float16, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            want = total(torch.relu, x).dtype
            with pytest.warns(HopkitWarning, match="autocast changes what the body itself computes"):
                graph = make_fx(lambda x: total(torch.relu, x))(x)
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert graph(x).dtype == want == torch.float32
