"""``custom_vjp``: a function with a derivative of its own, both given as subgraphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

import hopkit
from hopkit.extend.autograd import differentiable, every_level
from hopkit.extend.body import flatten, own, split
from hopkit_controlflow.vectors import shown

NAME = "controlflow_custom_vjp"

T = TypeVar("T")
Gradients = Sequence[torch.Tensor | None]


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_custom_vjp`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
    return [
        hopkit.Sample((lambda x: (x.sin(), x.cos()), lambda cos, g: (g * cos,), (x,)), name="residual"),
        hopkit.Sample((lambda x: (x, ()), lambda _, g: (-g,), (x,)), name="reversed"),
        hopkit.Sample((lambda x: (x.exp() * weight, x), lambda x, g: (g * x,), (x,)), name="capture"),
        hopkit.Sample(
            (
                lambda t, n: ({"a": t["x"] * t["y"], "n": n + 1}, (t["x"], t["y"])),
                lambda xy, g: ({"x": g["a"] * xy[1], "y": 2 * g["a"] * xy[0]}, None),
                ({"x": x, "y": x + 1}, torch.arange(3)),
            ),
            name="pytrees",
        ),
    ]


def _pair(given: object) -> tuple[Any, object]:
    if isinstance(given, tuple) and len(given) == 2:
        return given
    raise hopkit.SubgraphError(
        f"subgraph 'forward' of op '{NAME}'",
        f"gives a {type(given).__qualname__}",
        why="'backward' gets what 'forward' keeps for it",
        todo="Return `(result, residuals)`; with nothing to keep, `(result, ())`",
    )


def _examples(
    forward: hopkit.Subgraph[Any],
    backward: hopkit.Subgraph[Any],  # the body's signature
    operands: tuple[object, ...] = (),
) -> tuple[object, ...]:
    xs, fill = split(operands)
    operands = fill([x.detach() for x in xs])  # as the body gives them
    result, residuals = _pair(forward(*operands))
    ys, fill_result = split(result)
    return operands, (residuals, fill_result([torch.zeros_like(y) for y in ys], None))


class _Once(torch.autograd.Function):
    """A derivative by what ``forward`` closes over. It depends on the operands too, but nobody knows how: ``forward``
    ran apart from them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:  # the derivative depends on them
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient, *_Once.refused(ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: object, tangent: torch.Tensor, *operands: torch.Tensor | None) -> torch.Tensor:  # torch's
        _Once.refused([t is not None for t in operands])
        return tangent.view_as(tangent)

    @staticmethod
    def refused(needed: Sequence[bool]) -> list[None]:
        if any(needed):
            raise hopkit.CaptureError(
                f"subgraph 'forward' of op '{NAME}'",
                "closes over a tensor whose derivative is differentiated by an operand",
                why="'forward' runs apart from the operands, whose derivative 'backward' gives: this one would be zero",
                todo="Pass the tensor as an operand, and let 'backward' give its gradient",
            )
        return [None] * len(needed)


def _once(value: torch.Tensor | None, operands: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return None if value is None else _Once.apply(value, *operands)  # type: ignore[no-untyped-call] # torch's own


class _Law(torch.autograd.Function):
    """Gives results and residuals as they are; their gradients reach the operands as ``pull`` says.

    Residuals are among what it gives, for a second derivative goes through them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(_: Callable[..., Gradients], count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.pull, ctx.count = inputs[:2]
        saved = (*inputs[2 : 2 + ctx.count], *output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[object, ...]:
        values, inside = ctx.saved_tensors, ctx.needs_input_grad[2 + ctx.count :]
        of_captures = [
            _once(g, values[: ctx.count]) if needed else None for g, needed in zip(gradients, inside, strict=True)
        ]
        return None, None, *ctx.pull(values, gradients), *of_captures

    @staticmethod
    @every_level
    def jvp(ctx: Any, values: Sequence[torch.Tensor], *inputs: Any) -> tuple[torch.Tensor, ...]:
        """``backward`` transposed: it is linear in the gradients."""
        tangents, results = inputs[2 : 2 + ctx.count], values[ctx.count :]
        moved = [i for i, t in enumerate(tangents) if t is not None]
        of_captures = [_once(t, values[: ctx.count]) for t in inputs[2 + ctx.count :]]
        found = [torch.zeros_like(v) if t is None else t for v, t in zip(results, of_captures, strict=True)]
        if not moved:
            return tuple(found)

        def pull(*gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pulled = ctx.pull(values, gradients)
            return tuple(torch.zeros_like(values[i]) if pulled[i] is None else pulled[i] for i in moved)

        _, push, *_ = torch.func.vjp(pull, *map(torch.zeros_like, results))
        return tuple(map(torch.add, found, push(tuple(tangents[i] for i in moved))))


@hopkit.define(NAME, inputs=_examples, samples=samples)
def custom_vjp(
    forward: hopkit.Subgraph[tuple[T, object]],
    backward: hopkit.Subgraph[Sequence[object]],
    operands: tuple[object, ...] = (),
) -> T:
    """``forward(*operands)[0]``, whose derivative by the operands is what ``backward`` gives.

    As ``jax.custom_vjp`` has it. A derivative by what ``forward`` closes over is that of its code; a second derivative
    goes through the residuals, by the code of ``forward``, and through ``backward``. In forward mode, ``backward`` is
    transposed.

    Args:
        forward: Gives ``(result, residuals)``, two pytrees. It does not see that ``operands`` have derivatives.
        backward: ``backward(residuals, gradients)`` gives one gradient per operand, in its structure, or None. It is
            linear in ``gradients``, which are as the result, with None in place of what has no derivative.
        operands: A tuple or list of pytrees of tensors.

    Raises:
        hopkit.SubgraphError: ``forward`` gives no pair, or ``backward`` something else than the operands' gradients.
    """
    xs, fill = split(operands)
    result, residuals = _pair(forward(*fill([x.detach() for x in xs])))
    ys, fill_result = split(own(result, operands))
    rs, fill_residuals = split(residuals)

    def pull(values: Sequence[torch.Tensor], gradients: Gradients) -> Gradients:
        of_ys, of_rs = gradients[: len(ys)], gradients[len(ys) :]
        found: list[torch.Tensor | None] = [None] * len(xs)
        if any(g is not None for g in of_ys):
            dense = [torch.zeros_like(y) if g is None else g for y, g in zip(ys, of_ys, strict=True)]
            found = _checked(backward(fill_residuals(values[len(xs) + len(ys) :]), fill_result(dense, None)), operands)
        if any(g is not None for g in of_rs):  # of a second derivative
            given = [i for i, g in enumerate(of_rs) if g is not None]

            def kept(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                again, _ = split(_pair(forward(*fill(tensors)))[1])
                return tuple(again[i] for i in given)

            _, pulled, *_ = torch.func.vjp(kept, *values[: len(xs)])
            behind = pulled(tuple(of_rs[i] for i in given))
            found = [b if a is None else a + b for a, b in zip(found, behind, strict=True)]
        return found

    given = _Law.apply(pull, len(xs), *xs, *ys, *rs)  # type: ignore[no-untyped-call] # torch's own
    return cast("T", fill_result(given[: len(ys)]))


def _checked(given: object, operands: Sequence[object]) -> list[torch.Tensor | None]:
    """The gradients of the operands' tensors that have derivatives."""
    if not isinstance(given, (tuple, list)) or len(given) != len(operands):
        raise _wrong(f"gives {shown(given)} for {len(operands)} operands")
    gradients: list[torch.Tensor | None] = []
    for number, (gradient, operand) in enumerate(zip(given, operands, strict=True)):
        leaves, tree = flatten(operand)
        found, found_tree = ([None] * len(leaves), tree) if gradient is None else flatten(gradient)
        if found_tree != tree:
            raise _wrong(f"gives {shown(gradient)} for operand {number}, which is {shown(operand)}")
        for x, g in zip(leaves, found, strict=True):
            if not (isinstance(x, torch.Tensor) and differentiable(x)):
                continue
            if not (g is None or (isinstance(g, torch.Tensor) and g.shape == x.shape)):
                raise _wrong(f"gives {shown(g)} for {shown(x)}, which is in operand {number}")
            gradients.append(g)
    return gradients


def _wrong(found: str) -> hopkit.SubgraphError:
    return hopkit.SubgraphError(
        f"subgraph 'backward' of op '{NAME}'",
        found,
        why="autograd adds each to what the operand has already",
        todo="Return one gradient per operand in a tuple, in its structure and of its shapes; None where there is none",
    )
