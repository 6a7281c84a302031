"""Operators of torch.library that compilers know how to call, for what they cannot inline: Python, and an error.

``hopkit::call`` is an ordinary operator of torch.library. Its ``effect`` twin is never removed, and keeps its order
(torch/_higher_order_ops/effects.py, 2.13 and 2.14; if that is gone, calls that have an effect are refused).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import cast

import torch
from torch.autograd import forward_ad

from hopkit._torch.autograd import NOT_IMPLEMENTED, below_autograd
from hopkit._torch.fakes import among, autograd_on, transforms_on
from hopkit._torch.later import after_import

Run = Callable[[Sequence[object]], Sequence[torch.Tensor]]

_runs: dict[str, tuple[Run, Run]] = {}
_library = torch.library.Library("hopkit", "FRAGMENT")
for _name in ("call", "call_with_effect"):
    _library.define(f"{_name}(str name, Tensor[] tensors, SymInt[] numbers, int[] order) -> Tensor[]")


def call(run: Run, like: Run, inputs: Sequence[object], *, effect: bool) -> tuple[torch.Tensor, ...]:
    """``run(inputs)``, when the compiled code gets there.

    Args:
        run: Called with the inputs, tensors and integers. Gives tensors.
        like: The same on stand-ins.
        inputs: What the compiler sees.
        effect: Whether it is to be called each time, in order, used or not.
    """
    if effect:
        _ordered()
    name = uuid.uuid4().hex  # no cache may take it for another call's
    _runs[name] = (run, like)
    operator = torch.ops.hopkit.call_with_effect if effect else torch.ops.hopkit.call
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    numbers = [value for value in inputs if not isinstance(value, torch.Tensor)]
    order = [int(isinstance(value, torch.Tensor)) for value in inputs]
    return tuple(cast("Sequence[torch.Tensor]", operator(name, tensors, numbers, order)))


def _inputs(tensors: Sequence[torch.Tensor], numbers: Sequence[int], order: Sequence[int]) -> list[object]:
    some, others = iter(tensors), iter(numbers)
    return [next(some) if is_tensor else next(others) for is_tensor in order]


def _run(
    name: str, tensors: Sequence[torch.Tensor], numbers: Sequence[int], order: Sequence[int]
) -> list[torch.Tensor]:
    run, _ = _runs[name]
    taken = {tensor.untyped_storage()._cdata for tensor in tensors}
    given = []
    with transforms_on():
        for result in run(_inputs(tensors, numbers, order)):
            # What an operator gives is its own: the body may give an operand back, or two views of one tensor.
            own = result.clone() if result.untyped_storage()._cdata in taken else result
            taken.add(own.untyped_storage()._cdata)
            given.append(own)
    return given


def _like(
    name: str, tensors: Sequence[torch.Tensor], numbers: Sequence[int], order: Sequence[int]
) -> list[torch.Tensor]:
    _, like = _runs[name]
    with transforms_on(), autograd_on():  # a subgraph may differentiate something
        given = _inputs(tensors, numbers, order)
        result = among(given, lambda: like(given))
        return [torch.empty_like(t) for t in cast("Sequence[torch.Tensor]", result)]


for _name in ("call", "call_with_effect"):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hopkit::{_name}", _like, lib=_library)


_library.define("raise_in_backward(str op, Tensor input, Tensor[] gradients) -> Tensor")


def raises_when_run(op: str, input: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """A gradient of ``input`` that is computed of ``gradients``, as far as a compiler sees. Who runs it is told.

    Gradients of zeros give zeros: AOTAutograd has them for outputs that no gradient was asked of.
    """
    return cast("torch.Tensor", torch.ops.hopkit.raise_in_backward(op, input, list(gradients)))


def _raise(op: str, input: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    if any(gradient.count_nonzero() for gradient in gradients):
        raise RuntimeError(NOT_IMPLEMENTED.format(op))
    return torch.zeros_like(input)


_library.impl("raise_in_backward", _raise, "CompositeExplicitAutograd")
torch.library.register_fake("hopkit::raise_in_backward", lambda _op, x, _gradients: torch.empty_like(x), lib=_library)


def _ordered() -> None:
    from torch._higher_order_ops import effects  # loaded with torch's compiler

    if effects._get_effect("hopkit::call_with_effect") is None:
        effects._register_effectful_op("hopkit::call_with_effect", effects._EffectType.ORDERED)


_library.define("without_gradient(Tensor input) -> Tensor")


def without_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor``, as one operator: it has a tangent in forward mode, and no gradient in reverse."""
    return cast("torch.Tensor", torch.ops.hopkit.without_gradient(tensor))


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """A view of ``tensor``, as one operator of torch's: it has neither a tangent nor a gradient."""
    return cast("torch.Tensor", torch.ops.aten.view.dtype(tensor, tensor.dtype))


CONSTANT = (torch.ops.hopkit.without_gradient.default, torch.ops.aten.view.dtype)
"""What gives what has no gradient."""


def _pass_tangent_on(tensor: torch.Tensor) -> torch.Tensor:
    tangent = None
    if forward_ad._current_level >= 0:
        tensor, tangent = forward_ad.unpack_dual(tensor)
    with below_autograd():
        result = without_gradient(tensor)
    return result if tangent is None else forward_ad.make_dual(result, without_gradient(tangent))


def _lower(inductor: ModuleType) -> None:
    inductor.register_lowering(torch.ops.hopkit.without_gradient, type_promotion_kind=None)(lambda value: value)


_library.impl("without_gradient", torch.clone, "CompositeExplicitAutograd")
_library.impl("without_gradient", _pass_tangent_on, "Autograd")
torch.library.register_vmap("hopkit::without_gradient", lambda _, dims, x: (without_gradient(x), *dims), lib=_library)
after_import("torch._inductor.lowering", _lower)
