"""What the text of a program is made of: small functions that take tensors of any rank."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor


def mm(x: Tensor, y: Tensor) -> Tensor:
    y = y.to(x.dtype)
    return x * y if x.dim() == 0 or y.dim() == 0 else x @ y


def total(x: Tensor, axis: int) -> Tensor:
    return x.sum(axis % x.dim()) if x.dim() else x.clone()


def mean(x: Tensor, axis: int) -> Tensor:
    return x.mean(axis % x.dim()) if x.dim() else x * 1


def highest(x: Tensor) -> Tensor:
    return x.amax(-1) if x.dim() else x + 0


def running(x: Tensor) -> Tensor:
    return x.cumsum(0) if x.dim() else x * 2


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1) if x.dim() else x.sigmoid()


def turned(x: Tensor) -> Tensor:
    return x.transpose(-1, -2) if x.dim() > 1 else x


def first(x: Tensor) -> Tensor:
    return x[0] if x.dim() else x


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1)[: x.shape[-1]] if x.dim() else x.reshape(())


def rows(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.unbind(0)) if x.dim() else (x,)


def bumped(x: Tensor) -> Tensor:
    """Written to in place, where nobody else sees it."""
    y = x.clone()
    y.mul_(2)
    return y


def quiet(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
    return x + y


def largest(x: Tensor) -> Tensor:
    """Integers, from floating-point numbers."""
    return x.argmax(-1) if x.dim() else x.argmax()


def mapped(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row.sin() * row)(x) if x.dim() else x.sin()


def derived(x: Tensor) -> Tensor:
    return cast("Tensor", torch.func.grad(lambda y: (y.sin() * y).sum())(x))


class _Tenfold(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 10

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[object, ...], output: object) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * 7


def tenfold(x: Tensor) -> Tensor:
    """With a derivative that is not its own."""
    return cast("Tensor", _Tenfold.apply(x))  # type: ignore[no-untyped-call] # torch's own


def tensor(seed: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str, grad: bool) -> Tensor:
    """An operand or a capture, the same for the same arguments.

    Args:
        seed: What its numbers are.
        shape: Its shape.
        dtype: Its dtype.
        layout: "plain", "turned" (column major), "apart" (every second element) or "spread" (the same row repeated).
        grad: Whether it requires a gradient, where it can.
    """
    size = math.prod(shape)
    values = torch.rand(2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    values = (values * 3 if not dtype.is_floating_point else values).to(dtype)
    if layout == "turned" and len(shape) > 1:
        result = values[:size].reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    elif layout == "apart" and shape:
        result = values.reshape(*shape, 2)[..., 0]
    elif layout == "spread" and len(shape) > 1 and size:
        result = values[: math.prod(shape[1:])].reshape(shape[1:]).expand(shape)
    else:
        result = values[:size].reshape(shape)
    return result.requires_grad_(grad and dtype.is_floating_point)


def held(module: torch.nn.Module, name: str, value: Tensor) -> None:
    """Let a module have a capture: as a parameter where it requires a gradient."""
    if value.requires_grad:
        module.register_parameter(name, torch.nn.Parameter(value))
    else:
        module.register_buffer(name, value)
