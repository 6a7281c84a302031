"""Autograd's side of an op: below it, around it, and errors that wait for backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Sequence
from typing import Protocol, cast

import torch
from torch.autograd.function import FunctionCtx

from hopkit._torch import trees


def below_autograd() -> contextlib.AbstractContextManager[None]:
    """Inside, operators enter torch's dispatcher under the autograd keys."""
    return cast("contextlib.AbstractContextManager[None]", torch._C._AutoDispatchBelowAutograd())


def needs_gradient(values: Sequence[object]) -> bool:
    """Whether gradients are recorded, and one of these tensors asks for one."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*values)


def versions(values: Sequence[object]) -> list[int]:
    """How often each of these tensors was written to."""
    return [value._version for value in values if isinstance(value, torch.Tensor)]


def differentiable(value: object) -> bool:
    """Whether this is a tensor of a dtype that has gradients."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def tied(outputs: object, sources: Sequence[object]) -> object:
    """``outputs``, stand-ins that were made from nothing, with gradients that reach all of ``sources``."""
    if not needs_gradient(sources):
        return outputs
    links = [s.abs().sum() for s in sources if isinstance(s, torch.Tensor) and s.requires_grad]

    def tie(output: torch.Tensor) -> torch.Tensor:
        return output + torch.stack([link.to(output.device, output.dtype) for link in links]).sum()

    return trees.map_only(torch.Tensor, lambda t: tie(t) if differentiable(t) else t, outputs)


class Step(Protocol):
    """One differentiable step: what `apply` puts on the autograd tape.

    Attributes:
        constant: The outputs that have no gradient, besides those of dtypes that have none.
        repeats: Whether ``backward``, where gradients are on, can be differentiated whatever ``forward`` saved.
    """

    constant: Container[int] = ()
    repeats: bool = False

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """``(outputs, saved)``; gradients are off."""

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        """The gradients of the inputs."""


class _Context(FunctionCtx):
    step: Step
    numbers: dict[int, object]
    kept: int
    computed: bool
    saved_tensors: tuple[torch.Tensor, ...]


class _Tape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, step: Step, *inputs: object) -> tuple[object, ...]:
        outputs, saved = step.forward(inputs)
        known = {id(v) for v in (*inputs, *outputs)}
        tensors = [v for v in saved if isinstance(v, torch.Tensor)]
        ctx.step, ctx.kept = step, len(tensors)
        ctx.numbers = {i: v for i, v in enumerate(saved) if not isinstance(v, torch.Tensor)}
        ctx.computed = not step.repeats and any(id(v) not in known and not isinstance(v, _NUMBERS) for v in saved)
        ctx.save_for_backward(*tensors, *(_differentiated(inputs) if ctx.computed else ()))
        given = {i: o for i, o in enumerate(outputs) if isinstance(o, torch.Tensor)}
        ctx.mark_non_differentiable(*(o for i, o in given.items() if i in step.constant or not differentiable(o)))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        unpacked = ctx.saved_tensors  # once: checkpointing computes them when they are asked for
        tensors = iter(unpacked[: ctx.kept])
        saved = tuple(ctx.numbers[i] if i in ctx.numbers else next(tensors) for i in range(ctx.kept + len(ctx.numbers)))
        if not (ctx.computed and torch.is_grad_enabled()):
            return (None, *ctx.step.backward(saved, gradients))
        # What a rule computed and saved has no history: a second derivative through it would be wrong without a word.
        with torch.no_grad():
            found = ctx.step.backward(saved, gradients)
        inputs = unpacked[ctx.kept :]
        return (None, *_Last.apply(len(found), *found, *inputs, *gradients))  # type: ignore[no-untyped-call] # torch's own


class _Last(torch.autograd.Function):
    """Tensors that depend on others in a way that nobody can differentiate. (torch's ``once_differentiable`` leaves the
    dependence out, so that a second derivative with another part is that part alone.)
    """

    @staticmethod
    def forward(_: FunctionCtx, count: int, *values: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tuple(value if value is None else value.detach() for value in values[:count])

    @staticmethod
    def backward(*_: object) -> object:
        raise RuntimeError(
            "a hand-written backward cannot be differentiated: its forward saved what is neither an input nor an output"
        )


_NUMBERS = (bool, int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)


def _differentiated(values: Sequence[object]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]


def apply(step: Step, inputs: Sequence[object]) -> tuple[object, ...]:
    """Run ``step`` on the autograd tape."""
    return cast("tuple[object, ...]", _Tape.apply(step, *inputs))  # type: ignore[no-untyped-call] # torch's own


def computed(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf as if it had been computed: it may be written to, and a backward does not get past it."""
    return _PAST_INPUTS(tensor)


_PAST_INPUTS = torch._C._functions.DelayedError("a backward inside a subgraph goes on to what its inputs came from", 1)


def raise_in_backward(op: str) -> Callable[[object], object]:
    """A function of an op's outputs: it replaces every floating-point tensor by one whose backward raises.

    As ``autograd_not_implemented`` with a deferred error does, in its words (torch/_higher_order_ops/utils.py).
    """
    error = torch._C._functions.DelayedError(f"Autograd not implemented for {op}", 1)

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return error(tensor.requires_grad_() if differentiable(tensor) else tensor)

    return functools.partial(trees.map_tensors, mark)
