"""Functionalization's side of an op (torch/_subclasses/functional_tensor.py)."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch._C import DispatchKey
from torch._C._functorch import TransformType
from torch._higher_order_ops.auto_functionalize import can_auto_functionalize, do_auto_functionalize_v2
from torch._higher_order_ops.schema import HopSchema
from torch._higher_order_ops.utils import HopInstance
from torch._ops import HigherOrderOperator
from torch._subclasses.functional_tensor import (
    CppFunctionalizeAPI,
    FunctionalTensor,
    FunctionalTensorMode,
    FunctorchFunctionalizeAPI,
    PythonFunctionalizeAPI,
)
from torch.overrides import TorchFunctionMode

from hopkit._torch.autograd import differentiable
from hopkit._torch.library import detached
from hopkit._torch.operator import Kernel, Key

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("hopkit.functionalized", default=False)


class Functionalizer(Protocol):
    """The functionalization at hand: torch has three, and they wrap tensors differently."""

    def wrap_tensors(self, args: tuple[object, ...]) -> tuple[object, ...]:
        """Every tensor as functionalization's own."""

    def unwrap_tensors(self, args: tuple[object, ...]) -> tuple[object, ...]:
        """The inverse."""

    def functionalize(self, inner_f: Callable[..., object]) -> Callable[..., object]:
        """A callable without mutation."""

    def redispatch_to_next(self) -> contextlib.AbstractContextManager[None]:
        """Inside, this functionalization is off."""

    def replace(self, input_tensor: torch.Tensor, output_tensor: torch.Tensor) -> None:
        """Let a wrapped tensor hold a plain one."""

    def commit_update(self, tensor: torch.Tensor) -> None:
        """Let what shares memory with a wrapped tensor know."""

    def sync(self, tensor: torch.Tensor) -> None:
        """Let a wrapped tensor know what was written to its memory."""


class _Transform(FunctorchFunctionalizeAPI):
    """``torch.func.functionalize``. torch's own class takes "views" and "no views" for each other (2.13, 2.14)."""

    @property
    def views(self) -> bool:
        """Whether views stay."""
        return bool(self.interpreter.functionalize_add_back_views())

    def functionalize(self, inner_f: Callable[..., object]) -> Callable[..., object]:
        return torch.func.functionalize(inner_f, remove="mutations" if self.views else "mutations_and_views")


def kernels(rule: Callable[..., object]) -> dict[Key, Kernel]:
    """``rule(functionalizer, *args)`` under torch's three entries."""
    return {
        DispatchKey.Functionalize: lambda *args, **kwargs: rule(CppFunctionalizeAPI(), *args, **kwargs),
        FunctionalTensorMode: lambda mode, /, *args, **kwargs: rule(PythonFunctionalizeAPI(mode), *args, **kwargs),
        TransformType.Functionalize: lambda layer, /, *args, **kwargs: rule(_Transform(layer), *args, **kwargs),
    }


def functionalized(
    layer: Functionalizer, function: Callable[..., object], *, views: bool = False
) -> Callable[..., object]:
    """``function`` without mutation; what it writes to its arguments is copied there in the end.

    AOTAutograd's functionalization drops that where torch asks for a callable; the two others copy by themselves.

    Args:
        layer: The functionalization at hand.
        function: What is to be without mutation.
        views: Whether it may have views, whatever ``layer`` says.
    """
    if not by_mode(layer):
        return torch.func.functionalize(function) if views else layer.functionalize(_without_views(function))

    def called(*args: object) -> object:
        written: list[int] = []
        token = _inside.set(True)

        def inner(*wrapped: object) -> tuple[object, ...]:
            result = cast("Sequence[object]", function(*wrapped))
            written.extend(i for i, value in enumerate(wrapped) if _written(value))
            return (*result, *(wrapped[i] for i in written))

        try:
            outputs = cast("Sequence[object]", layer.functionalize(inner)(*args))
        finally:
            _inside.reset(token)
        count = len(outputs) - len(written)
        for i, new in zip(written, outputs[count:], strict=True):
            cast("torch.Tensor", args[i]).copy_(cast("torch.Tensor", new))
        return tuple(outputs[:count])

    return called


_DETACHING = frozenset({torch.detach, torch.Tensor.detach, torch.ops.aten.detach.default})


class _Copying(TorchFunctionMode):
    """Detaches by copying. torch's own copy of what it detaches has no derivative, not even none."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in _DETACHING and differentiable(args[0]):
            return detached(cast("torch.Tensor", args[0]))
        return func(*args, **(kwargs or {}))


def _without_views(function: Callable[..., object]) -> Callable[..., object]:
    def run(*args: object) -> object:
        with _Copying():
            return function(*args)

    return run


def keeps_views(layer: Functionalizer) -> bool:
    """Whether a functionalization removes mutation alone."""
    return isinstance(layer, _Transform) and layer.views


def inside() -> bool:
    """Whether a graph that a node carries is made functional, and not the graph that has the node."""
    return _inside.get()


def _written(value: object) -> bool:
    if not isinstance(value, FunctionalTensor):
        return False
    return bool(torch._functionalize_has_data_mutation(value.elem))  # type: ignore[attr-defined] # torch's own stub


def active(layer: Functionalizer) -> contextlib.AbstractContextManager[object]:
    """Inside, this functionalization is on: a mode is off while its rule runs, the two others are not."""
    return cast("PythonFunctionalizeAPI", layer).mode if by_mode(layer) else contextlib.nullcontext()


def assignable(layer: Functionalizer, value: object) -> bool:
    """Whether this is a tensor that ``layer`` wrapped: others are real, and it would write to them for good."""
    return isinstance(value, FunctionalTensor) if by_mode(layer) else is_functional(value)


def is_functional(value: object) -> bool:
    """Whether this is a tensor that ``torch.func.functionalize`` wrapped."""
    return isinstance(value, torch.Tensor) and torch._is_functional_tensor(value)


def assign(layer: Functionalizer, old: torch.Tensor, new: torch.Tensor) -> None:
    """Write ``new`` to ``old``, both wrapped."""
    (plain,) = cast("tuple[torch.Tensor]", layer.unwrap_tensors((new,)))
    layer.replace(old, plain)
    layer.commit_update(old)
    layer.sync(old)


def automatic(
    layer: Functionalizer,
    operator: Callable[..., object],
    schema: torch.FunctionSchema,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> object:
    """As torch does with an operator that writes to its inputs (torch/_higher_order_ops/auto_functionalize.py).

    None: not here. The same in 2.13 and 2.14; if it is gone, the op is called on copies.
    """
    instance = HopInstance(cast("HigherOrderOperator", operator), cast("HopSchema", schema))
    names = [argument.name for argument in schema.arguments]  # an option may be called as torch calls an input
    if not by_mode(layer) or not can_auto_functionalize(instance) or len(set(names)) < len(names):
        return None
    mode = cast("PythonFunctionalizeAPI", layer).mode
    return cast("object", do_auto_functionalize_v2(mode, instance, args, dict(kwargs)))


def by_mode(layer: Functionalizer) -> bool:
    """Whether this is the functionalization of AOTAutograd, a dispatch mode."""
    return isinstance(layer, PythonFunctionalizeAPI)


def memory(tensor: torch.Tensor) -> object:
    """Equal for tensors that share memory, wrapped or not. None: nobody knows, as for a sparse one."""
    elem = tensor.elem if isinstance(tensor, FunctionalTensor) else tensor
    try:
        return elem.untyped_storage()._cdata if torch._C._has_storage(elem) else None
    except NotImplementedError:  # a wrapper of torch.func's that it does not know as one any more
        return None


def frozen(value: object) -> object:
    """A tensor of AOTAutograd's as it is now: what is written to it later is not seen."""
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)
    return FunctionalTensor.to_functional(torch._from_functional_tensor(value.elem))
