"""Autograd's side of an op: below it, around it, and errors that wait for backward."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from hopkit._torch import trees


def below_autograd() -> contextlib.AbstractContextManager[None]:
    """Inside, operators enter torch's dispatcher under the autograd keys."""
    return cast("contextlib.AbstractContextManager[None]", torch._C._AutoDispatchBelowAutograd())


def needs_gradient(values: Sequence[object]) -> bool:
    """Whether gradients are recorded, and one of these tensors asks for one."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*values)


def differentiable(value: object) -> bool:
    """Whether this is a tensor of a dtype that has gradients."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


class Step(Protocol):
    """One differentiable step: what `apply` puts on the autograd tape."""

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """``(outputs, saved)``; gradients are off."""

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        """The gradients of the inputs."""


class _Context(FunctionCtx):
    step: Step
    numbers: dict[int, object]
    once: bool
    saved_tensors: tuple[torch.Tensor, ...]


class _Tape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, step: Step, *inputs: object) -> tuple[object, ...]:
        outputs, saved = step.forward(inputs)
        ctx.step = step
        ctx.numbers = {i: v for i, v in enumerate(saved) if not isinstance(v, torch.Tensor)}
        tensors = [v for v in saved if isinstance(v, torch.Tensor)]
        ctx.once = not {id(v) for v in tensors} <= {id(v) for v in (*inputs, *outputs)}
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(o for o in outputs if isinstance(o, torch.Tensor) and not differentiable(o)))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # What a rule computed and saved has no history: a second derivative through it would be wrong without a word.
        return (once_differentiable(_backward) if ctx.once else _backward)(ctx, *gradients)


def _backward(ctx: _Context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    tensors = iter(ctx.saved_tensors)
    count = len(ctx.saved_tensors) + len(ctx.numbers)
    saved = tuple(ctx.numbers[i] if i in ctx.numbers else next(tensors) for i in range(count))
    return (None, *ctx.step.backward(saved, gradients))


def apply(step: Step, inputs: Sequence[object]) -> tuple[object, ...]:
    """Run ``step`` on the autograd tape."""
    return cast("tuple[object, ...]", _Tape.apply(step, *inputs))  # type: ignore[no-untyped-call] # torch's own


def raise_in_backward(message: str, outputs: object) -> object:
    """``outputs``, with every floating-point tensor replaced by one whose backward raises ``message``.

    As ``autograd_not_implemented`` with a deferred error does (torch/_higher_order_ops/utils.py).
    """
    error = torch._C._functions.DelayedError(message, 1)

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return error(tensor.requires_grad_() if differentiable(tensor) else tensor)

    return trees.map_only(torch.Tensor, mark, outputs)
