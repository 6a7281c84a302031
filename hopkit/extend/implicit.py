"""Derivatives of what solves an equation ``F(x, inputs) = 0``: by the equation, and not by the way to its solution.

``-dF/dx`` times the tangent of ``x`` is ``dF/dinputs`` times the tangents of the inputs. Backwards that is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from hopkit._torch.autograd import Step, apply, below_autograd, differentiable, dual, needs_gradient
from hopkit._torch.levels import Duals, Tangents
from hopkit.call import Call
from hopkit.extend.body import split
from hopkit.rule import Decline, on_call
from hopkit.transform import of_inputs

if TYPE_CHECKING:
    from hopkit.op import Op

__all__ = ["Equation", "Values", "derive"]

Values = Mapping[str, Any]
"""The arguments of a call, by parameter."""

Tensors = Sequence[torch.Tensor]


class Equation(Protocol):
    """What an op solves. The tensors of its result begin with those of ``x``, all of them its own.

    Attributes:
        like: The operand that ``x`` is like.
    """

    like: str

    def residual(self, values: Values, x: Any) -> Any:
        """``F``, as ``x``."""

    def solve(self, values: Values, x: Any, right: Any, *, transposed: bool) -> Any:
        """What ``-dF/dx``, or its transpose, maps to ``right``."""


class _At:
    """An equation at one call's inputs."""

    def __init__(self, equation: Equation, call: Call, inputs: Sequence[object], outputs: Tensors) -> None:
        self._equation, self._inputs = equation, inputs
        self._call = call.item
        self._values = self._call.replace(inputs=inputs).values()
        xs, self._fill = split(self._values[equation.like])
        self._count = len(xs)
        self._x = self._fill(outputs[: self._count])

    def _residual(self, wrt: Sequence[int]) -> Any:
        def residual(*some: torch.Tensor) -> tuple[torch.Tensor, ...]:
            changed = dict(zip(wrt, some, strict=True))
            inputs = [changed.get(i, value) for i, value in enumerate(self._inputs)]
            return tuple(split(self._equation.residual(self._call.replace(inputs=inputs).values(), self._x))[0])

        return torch.func.vjp(residual, *(cast("torch.Tensor", self._inputs[i]) for i in wrt))[1]

    def pull(self, wrt: Sequence[int], gradients: Tensors) -> Tensors:
        """The gradients of the inputs ``wrt``."""
        right = self._fill(gradients[: self._count])
        found = self._equation.solve(self._values, self._x, right, transposed=True)
        return cast("Tensors", self._residual(wrt)(tuple(split(found)[0])))

    def push(self, wrt: Sequence[int], tangents: Tensors) -> Tensors:
        """The tangent of ``x``, for those of the inputs ``wrt``."""
        pull = self._residual(wrt)  # twice transposed, so that no tracer meets another level of forward mode
        zeros = tuple(map(torch.zeros_like, split(self._x)[0]))
        right = self._fill(torch.func.vjp(lambda *gs: pull(gs), *zeros)[1](tuple(tangents)))
        return split(self._equation.solve(self._values, self._x, right, transposed=False))[0]


def _batches(call: Call) -> list[tuple[int | None, ...]]:
    """Of every vmap that the call is under, from the inside out, the dimensions of its inputs."""
    if call.batches is None:
        raise Decline("it is another derivative already")
    return [dims for dims, _ in call.batches]


class _Implicit(Step):
    """A call as one step of the tape."""

    repeats = True

    def __init__(self, equation: Equation, call: Call) -> None:
        self._equation, self._call, self._batches = equation, call, _batches(call)

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        with below_autograd():
            outputs = cast("tuple[object, ...]", self._call.replace(inputs=inputs)())
        return outputs, (*inputs, *outputs)

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        count = len(self._call.inputs)
        inputs, outputs = saved[:count], cast("Tensors", saved[count:])
        results: list[torch.Tensor | None] = [None] * count
        wrt = [
            i for i, v in enumerate(self._call.inputs) if differentiable(v) and cast("torch.Tensor", v).requires_grad
        ]
        if all(g is None for g in gradients) or not wrt:
            return results

        def run(inputs: Sequence[object], outputs: Tensors, gradients: Tensors) -> Tensors:
            return tuple(_At(self._equation, self._call, inputs, outputs).pull(wrt, gradients))

        for dims in self._batches:
            run = _batched(run, dims, wrt)
        dense = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, gradients, strict=True)]
        for i, gradient in zip(wrt, run(inputs, outputs, tuple(dense)), strict=True):
            results[i] = gradient
        return results


def _batched(run: Any, dims: tuple[int | None, ...], wrt: Sequence[int]) -> Any:
    def batched(inputs: Sequence[object], outputs: Tensors, gradients: Tensors) -> Tensors:
        found = torch.vmap(run, in_dims=(dims, 0, 0))(tuple(inputs), outputs, gradients)
        return of_inputs(found, [dims[i] for i in wrt])

    return batched


def _pushed(
    equation: Equation, call: Call, inputs: Sequence[object], tangents: Mapping[int, torch.Tensor]
) -> tuple[tuple[object, ...], Tensors]:
    """The outputs of the call, and the tangents of those that have one: the first."""
    outputs = cast("tuple[torch.Tensor, ...]", call.replace(inputs=inputs)())
    wrt = list(tangents)

    def run(inputs: Sequence[object], outputs: Tensors, tangents: Tensors) -> Tensors:
        return tuple(_At(equation, call, inputs, outputs).push(wrt, tangents))

    for dims in _batches(call):
        run = torch.vmap(run, in_dims=(dims, 0, tuple(dims[i] for i in wrt)))
    return outputs, run(tuple(inputs), outputs, tuple(tangents.values()))


def _dual(equation: Equation, level: Tangents, call: Call) -> object:
    """The outputs of the call, with their tangents."""
    _batches(call)
    inputs, tangents = level.unpack(call.inputs)
    if not tangents:
        raise Decline("nothing has a tangent")
    with level.lower():
        outputs, found = _pushed(equation, call, inputs, tangents)
    return level.pack(outputs, dict(enumerate(found)))


def derive(op: Op[..., Any], equation: Equation) -> None:
    """Let ``op``, which solves ``equation``, have its derivatives by it in every mode."""

    @op.rule("autograd")
    @on_call  # plain forward mode asks it too
    def on_tape(call: Call) -> object:
        _batches(call)
        if dual(call.inputs):
            return _dual(equation, Duals(), call)
        if needs_gradient(call.inputs):
            return apply(_Implicit(equation, call), call.inputs)
        with below_autograd():
            return call()

    @op.rule("jvp")
    @on_call
    def in_forward_mode(level: Tangents, call: Call) -> object:
        return _dual(equation, level, call)
