"""Tensor subclasses, as operands and as captures: an op gives what its body gives, gradients included."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.masked import masked_tensor

from hopkit._torch import trees
from tests.recording import define_twice, same

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of (MaskedTensors|nested tensors) is in prototype stage"),
    pytest.mark.filterwarnings("ignore:It is not recommended to create a MaskedTensor"),
]

Two: Any = importlib.import_module("torch.testing._internal.two_tensor").TwoTensor  # torch has no public one
Function = Callable[..., Any]

X = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)
W = torch.linspace(0.5, 1.5, 9).reshape(3, 3)


def plain(body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `define_twice` defines, as a function."""
    result: Tensor = 1.0 * body(body(x))
    return result


class Quantised(Tensor):
    """A weight in eight bits. Operators see the numbers that they stand for."""

    stored: Tensor
    scale: float

    def __new__(cls, stored: Tensor, scale: float) -> Quantised:
        self = Tensor._make_wrapper_subclass(cls, stored.shape, stored.stride(), dtype=torch.float32)
        self.stored, self.scale = stored, scale
        return self

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["stored"], self.scale

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], scale: float, size: object, stride: object) -> Quantised:
        return Quantised(inner["stored"], scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override] # torch's stub leaves out the operator
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].stored, args[0].scale)
        exact: Any = trees.map_only(Quantised, lambda w: w.stored * w.scale, (args, dict(kwargs or {})))
        return func(*exact[0], **exact[1])


class Metres(Tensor):
    """Overrides functions of torch, and no operator: it remembers which it saw."""

    seen: list[str] = []  # noqa: RUF012 - of the class

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Metres.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call] # torch's own


def masked() -> Any:
    return masked_tensor(X.clone(), torch.eye(3) > 0, requires_grad=True)


def nested(layout: torch.layout) -> Any:
    parts = [torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)


MAKERS: dict[str, Callable[[], Any]] = {
    "TwoTensor": lambda: Two(X.clone(), X + 1).requires_grad_(),
    "MaskedTensor": masked,
    "jagged": lambda: nested(torch.jagged),
    "nested": lambda: nested(torch.strided),
    "__torch_function__": lambda: X.clone().as_subclass(Metres).requires_grad_(),
    "Parameter": lambda: torch.nn.Parameter(X.clone()),
    "Buffer": lambda: torch.nn.Buffer(X.clone()).requires_grad_(),
}
MATMUL = ("TwoTensor", "jagged", "__torch_function__", "Parameter", "Buffer")


def numbers(value: Any) -> object:
    """The plain tensors in a tensor of any class."""
    if isinstance(value, Two):
        return [value.a, value.b]
    if hasattr(value, "get_data"):
        return [value.get_data().masked_fill(~value.get_mask(), 0.0), value.get_mask()]
    if value.is_nested:
        return list(value.unbind())
    return value.as_subclass(Tensor)


def trained(call: Function, make: Callable[[], Any], w: Tensor | None) -> tuple[list[type], object]:
    """Value and gradients by the operand and the capture: their classes, and what is in them."""
    x = make()
    result = call((lambda y: y.sin() * 2) if w is None else lambda y: (y @ w).sin(), x)
    total = result.values().sum() if result.is_nested and result.layout is torch.jagged else None
    total = torch.nested.to_padded_tensor(result, 0.0).sum() if result.is_nested and total is None else total
    gradients = torch.autograd.grad(result.sum() if total is None else total, [x] if w is None else [x, w])
    found = [result, *gradients]
    return [type(t) for t in found], [numbers(t.detach()) for t in found]


@pytest.mark.parametrize("name", MAKERS)
def test_an_operand_of_a_class(name: str) -> None:
    found, wanted = (trained(call, MAKERS[name], None) for call in (define_twice(), plain))
    assert found[0] == wanted[0]
    same(found[1], wanted[1])


@pytest.mark.parametrize("name", MATMUL)
def test_an_operand_of_a_class_and_a_capture_that_has_none(name: str) -> None:
    w = W.clone().requires_grad_()
    found, wanted = (trained(call, MAKERS[name], w) for call in (define_twice(), plain))
    assert found[0] == wanted[0]
    same(found[1], wanted[1])


@pytest.mark.parametrize("name", MATMUL[2:])
def test_a_capture_of_a_class(name: str) -> None:
    def step(call: Function) -> list[Any]:
        x, w = X.clone().requires_grad_(), MAKERS[name]()
        result = call(lambda y: (y @ w).sin(), x)
        return [result, *torch.autograd.grad(result.sum(), [x, w])]

    found, wanted = step(define_twice()), step(plain)
    assert list(map(type, found)) == list(map(type, wanted))
    same(list(map(numbers, found)), list(map(numbers, wanted)))


def applied(call: Function, x: Tensor, w: Tensor) -> Any:
    return call(lambda y: (y @ w).sin(), x)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_weight_that_is_quantised(backend: str | None) -> None:
    weight = Quantised((W * 64).to(torch.int8), 1 / 64)

    def step(call: Function) -> tuple[Tensor, Tensor]:
        x = X.clone().requires_grad_()
        run: Any = functools.partial(applied, call)
        result = (run if backend is None else torch.compile(run, backend=backend))(x, weight)
        return result, *torch.autograd.grad(result.sum(), x)

    found = step(define_twice())
    exact = weight.stored * weight.scale
    x = X.clone().requires_grad_()
    wanted = plain(lambda y: (y @ exact).sin(), x)
    same(found, (wanted, *torch.autograd.grad(wanted.sum(), x)))


def test_a_class_in_compiled_code() -> None:
    twice = define_twice()

    def step(call: Function, backend: str | None) -> Any:
        x, w = Two(X.clone(), X + 1).requires_grad_(), W.clone().requires_grad_()
        run: Any = functools.partial(applied, call)
        result = (run if backend is None else torch.compile(run, backend=backend))(x, w)
        return [numbers(t.detach()) for t in (result, *torch.autograd.grad(result.sum(), [x, w]))]

    same(step(twice, "aot_eager"), step(plain, None))


def test_a_class_that_overrides_functions_sees_those_of_the_body() -> None:
    def names(call: Function) -> list[str]:
        Metres.seen.clear()
        call(torch.sin, X.as_subclass(Metres))
        return list(Metres.seen)

    twice = define_twice()
    assert names(twice) == names(plain)
    assert "sin" in names(twice)


def test_some_operands_of_a_class_among_others() -> None:
    twice = define_twice()
    two = Two(X.clone(), X + 1)
    got = cast("Any", twice(lambda y: y * two, X))
    want = cast("Any", plain(lambda y: y * two, X))
    assert type(got) is type(want) is Two
    same(numbers(got), numbers(want))
