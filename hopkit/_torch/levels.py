"""torch.func's levels, as an op meets them (torch/_functorch/pyfunctorch.py, torch._C._functorch; 2.13, 2.14).

If an interpreter is gone, the body runs in the transform, and no node is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import (
    FuncTorchInterpreter,
    GradInterpreter,
    JvpInterpreter,
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

VMAP, JVP, GRAD = TransformType.Vmap, TransformType.Jvp, TransformType.Grad

T = TypeVar("T")

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality

_DUAL = 0
"""torch has one level of dual numbers, which all of torch.func's share. A graph enters it without telling Python."""


def top() -> FuncTorchInterpreter | None:
    """The innermost active transform."""
    interpreters = retrieve_all_functorch_interpreters()
    return interpreters[-1] if interpreters else None


def functionalizes() -> bool:
    """Whether ``torch.func.functionalize`` is active."""
    return any(level.key() == TransformType.Functionalize for level in retrieve_all_functorch_interpreters())


def base(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that is no level's."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def living(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the levels of torch.func that are over: it may be kept for longer than they last."""
    while (value := _functorch.unwrap_if_dead(tensor)) is not tensor:
        tensor = value
    return tensor


def inside(value: object) -> bool:
    """Whether a tensor is what a transform of torch.func that is active made of another."""
    if not isinstance(value, torch.Tensor) or not _functorch.is_functorch_wrapped_tensor(value):
        return False
    return _functorch.maybe_get_level(value) in {i.level() for i in retrieve_all_functorch_interpreters()}


def batched(value: object) -> bool:
    """Whether a tensor differs among the items of a ``torch.vmap`` that is active, and no body can decide on it.

    Args:
        value: An operand, as a body gets it.
    """
    while isinstance(value, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(value):
        if _functorch.is_batchedtensor(value):
            return True
        value = _functorch.get_unwrapped(value)
    return False


def anywhere(value: object) -> bool:
    """Whether a number or a tensor of one element is true; where it is `batched`, whether it is for any item.

    Args:
        value: What a body got, or computed.
    """
    if isinstance(value, torch.Tensor) and batched(value):
        value = base(value).any()
    return bool(value)


def differentiating() -> bool:
    """Whether a transform of torch.func that differentiates is active."""
    return any(interpreter.key() in (GRAD, JVP) for interpreter in retrieve_all_functorch_interpreters())


@contextlib.contextmanager
def cleared() -> Iterator[Sequence[object]]:
    """Inside, no transform is active; gives those that were.

    Recorded code enters a transform and leaves it in two steps. What it has not left when it raises is left here.
    """
    allowed, duals = _functorch.get_inplace_requires_grad_allowed(), has_duals()
    disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    with temporarily_clear_interpreter_stack() as levels:
        try:
            yield levels
        except BaseException:
            while (interpreter := top()) is not None:
                _LEAVE[interpreter.key()]()
            _functorch.set_inplace_requires_grad_allowed(allowed)
            if not duals and has_duals():
                torch._C._exit_dual_level(level=_DUAL)
            if disabled is None:
                torch._C._autograd._saved_tensors_hooks_enable()
            raise


_LEAVE = {
    VMAP: _functorch._vmap_decrement_nesting,
    JVP: _functorch._jvp_decrement_nesting,
    GRAD: _functorch._grad_decrement_nesting,
    TransformType.Functionalize: _functorch._func_decrement_nesting,
}


@contextlib.contextmanager
def duals_shared() -> Iterator[None]:
    """Inside, ``torch.func.jvp`` takes part in the dual numbers around it, those of a graph or of `forward_ad`."""
    before = forward_ad._current_level
    if eager_transforms.JVP_NESTING or not (before >= 0 or has_duals()):
        yield
        return
    forward_ad._current_level = _DUAL
    eager_transforms.JVP_NESTING += 1
    try:
        yield
    finally:
        eager_transforms.JVP_NESTING -= 1
        forward_ad._current_level = before


def has_duals() -> bool:
    """Whether there is a level of dual numbers, also where a graph has entered it without telling Python."""
    try:
        level = torch._C._enter_dual_level()
    except RuntimeError:  # there is one, and there cannot be two
        return True
    torch._C._exit_dual_level(level=level)
    return False


def has_tangent(tensor: object) -> bool:
    """Whether this is a tensor that forward-mode AD knows a tangent of, asked so that nobody records the question."""
    if not isinstance(tensor, torch.Tensor) or torch.is_inference_mode_enabled():
        return False  # no operator passes one on in inference mode, and torch fails to look
    if torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD) and not _functorch.is_functorch_wrapped_tensor(
        tensor
    ):
        return False  # below autograd nothing has, but for what torch.func made
    if _functionalized(tensor):  # it is nothing without its mode, and inside torch.func torch fails to look twice
        return isinstance(tensor, FunctionalTensor) and forward_ad.unpack_dual(tensor, level=_DUAL).tangent is not None
    if torch._is_functional_tensor(tensor):  # of torch.func's functionalize, through which torch fails to look
        with temporarily_clear_interpreter_stack():
            return has_tangent(torch._from_functional_tensor(tensor))
    with _disable_current_modes():
        return forward_ad.unpack_dual(tensor, level=_DUAL).tangent is not None


def may_have_tangent(tensor: object) -> bool:
    """Whether nobody can tell if this is a dual number: functionalization's own tensor in a derivative.

    In ``torch.func.jvp`` its level tells.
    """
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FunctionalTensor) or not _functionalized(tensor):
        return False
    return not any(level.key() == JVP for level in retrieve_all_functorch_interpreters())


def without_tangent(value: T) -> T:
    """A tensor without the tangent that the innermost level of forward mode knows of it."""
    if not isinstance(value, torch.Tensor):
        return value
    if _functorch.is_batchedtensor(value):  # torch does not ask for tangents through a vmap
        inside, dim = without_tangent(_functorch.get_unwrapped(value)), _functorch.maybe_get_bdim(value)
        return cast("T", _functorch._add_batch_dim(inside, dim, _functorch.maybe_get_level(value)))
    return cast("T", forward_ad.unpack_dual(value, level=_DUAL).primal)


def _functionalized(tensor: torch.Tensor) -> bool:
    return isinstance(base(tensor), FunctionalTensor)


class Batch:
    """The level of one ``vmap``.

    Attributes:
        batch_size: How many there are of every batched value.
        randomness: "error", "same" or "different", as ``torch.vmap`` was told.
    """

    def __init__(self, interpreter: VmapInterpreter) -> None:
        self._interpreter, self._level = interpreter, interpreter.level()
        self.batch_size = interpreter.batch_size()
        self.randomness = interpreter.randomness()

    def lower(self) -> contextlib.AbstractContextManager[object]:
        """Inside, this vmap is off."""
        return self._interpreter.lower()

    def unwrap(self, values: Sequence[object]) -> tuple[list[object], tuple[int | None, ...]]:
        """Values below this level, and the dimension in which each is batched, or None."""
        below, dims = list(values), list[int | None]([None] * len(values))
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor) and self._batched(value):
                below[i], dims[i] = _functorch.get_unwrapped(value), _functorch.maybe_get_bdim(value)
        return below, tuple(dims)

    def wrap(self, value: T, dim: int | None = 0) -> T:
        """A value of this level, batched in dimension ``dim`` of the one below it."""
        if dim is None or not isinstance(value, torch.Tensor):
            return value
        return cast("T", _functorch._add_batch_dim(value, dim, self._level))

    def _batched(self, value: torch.Tensor) -> bool:
        return _functorch.is_batchedtensor(value) and _functorch.maybe_get_level(value) == self._level


class Tangents:
    """The level of one ``jvp``."""

    def __init__(self, interpreter: JvpInterpreter) -> None:
        self._interpreter, self._level = interpreter, interpreter.level()

    def lower(self) -> contextlib.AbstractContextManager[object]:
        """Inside, this jvp is off."""
        return self._interpreter.lower()

    def unpack(self, values: Sequence[object]) -> tuple[list[object], dict[int, torch.Tensor]]:
        """Values below this level, and the tangents of those that have one, by number."""
        primals: list[object] = list(values)
        tangents: dict[int, torch.Tensor] = {}
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                constant = not (_functionalized(value) or has_tangent(value))
                primal, tangent = (value, None) if constant else forward_ad.unpack_dual(value, level=_DUAL)
                primals[i] = _functorch._unwrap_for_grad(primal, self._level)
                if tangent is not None:
                    tangents[i] = _functorch._unwrap_for_grad(tangent, self._level)
        return primals, tangents

    def pack(self, values: Sequence[object], tangents: Mapping[int, torch.Tensor]) -> tuple[object, ...]:
        """The inverse of `unpack`."""
        packed = []
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                tangent = tangents.get(i)
                if tangent is not None and functionalizes():
                    with self.lower():  # or torch may lay the tangent out alike, and that has no derivative
                        value, tangent = (t.clone(memory_format=torch.contiguous_format) for t in (value, tangent))
                value = _functorch._wrap_for_grad(value, self._level)
                if tangent is not None:
                    if value.stride() != tangent.stride() and 0 in value.stride():
                        value = value.clone()  # torch lays the tangent out alike, and cannot write to what is expanded
                    value = forward_ad.make_dual(value, _functorch._wrap_for_grad(tangent, self._level), level=_DUAL)
            packed.append(value)
        return tuple(packed)


class Duals(Tangents):
    """The dual numbers of `torch.autograd.forward_ad`, outside torch.func."""

    def __init__(self) -> None:
        """There is one level of them."""

    def lower(self) -> contextlib.AbstractContextManager[object]:
        """Inside, nothing gets a tangent."""
        return forward_ad._set_fwd_grad_enabled(False)

    def unpack(self, values: Sequence[object]) -> tuple[list[object], dict[int, torch.Tensor]]:
        """Values, and the tangents of those that have one, by number."""
        primals: list[object] = list(values)
        tangents: dict[int, torch.Tensor] = {}
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor) and has_tangent(value):
                primals[i], tangents[i] = forward_ad.unpack_dual(value, level=_DUAL)
        return primals, tangents

    def pack(self, values: Sequence[object], tangents: Mapping[int, torch.Tensor]) -> tuple[object, ...]:
        """The inverse of `unpack`."""
        return tuple(
            forward_ad.make_dual(cast("torch.Tensor", value), tangents[i], level=_DUAL) if i in tangents else value
            for i, value in enumerate(values)
        )


class Gradients:
    """The level of one ``grad`` or ``vjp``."""

    def __init__(self, interpreter: GradInterpreter) -> None:
        self._interpreter, self._level = interpreter, interpreter.level()
        self._backward, self._forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    @contextlib.contextmanager
    def lower(self) -> Iterator[None]:
        """Inside, this level is off, and those below it differentiate as they did when it was met.

        A step of the tape turns gradients off for all of them.
        """
        forward = forward_ad._set_fwd_grad_enabled(self._forward)
        with torch.set_grad_enabled(self._backward), forward, self._interpreter.lower():
            yield

    def unwrap(self, value: T) -> T:
        """A value below this level."""
        return cast("T", _functorch._unwrap_for_grad(value, self._level)) if isinstance(value, torch.Tensor) else value

    def wrap(self, value: T) -> T:
        """A value of this level, of which nothing is known here."""
        return cast("T", _functorch._wrap_for_grad(value, self._level)) if isinstance(value, torch.Tensor) else value


def gradients() -> Gradients | None:
    """The innermost transform, if it is one that differentiates backwards."""
    interpreter = top()
    return Gradients(interpreter) if isinstance(interpreter, GradInterpreter) else None
