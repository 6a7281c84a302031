"""What of a function has no gradient, and how its graph tells so."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import TypeVar, cast

import torch
from torch.fx import Node
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.weak import WeakTensorKeyDictionary

from hopkit._torch import trees
from hopkit._torch.autograd import differentiable
from hopkit._torch.library import CONSTANT, detached, without_gradient

T = TypeVar("T")

ASKED = (torch.Tensor.requires_grad.__get__, torch.Tensor.is_leaf.__get__)  # type: ignore[attr-defined] # properties

_DETACHING = (
    torch.detach,
    torch.Tensor.detach,
    torch.Tensor.new_tensor,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined] # a property of C
)

# In a graph, autograd's own operators are among those of ATen. A hook is in no graph.
OPAQUE: dict[object, str] = {
    torch.Tensor.register_hook: "it has a hook on a gradient",
    **dict.fromkeys(
        (
            torch.Tensor.detach_,
            torch.ops.aten.detach,
            torch.ops.aten.detach.default,
            torch.ops.aten.detach_,
            torch.ops.aten.detach_.default,
        ),
        "a part of it is detached in place, or by an operator of ATen",
    ),
    **dict.fromkeys(ASKED, "it asks whether a tensor requires a gradient"),
}


def gives_constant(func: object) -> bool:
    """Whether what ``func`` gives here has no gradient, whatever it is given."""
    return func in _DETACHING or not (torch.is_grad_enabled() or func in ASKED)


_off: contextvars.ContextVar[bool] = contextvars.ContextVar("hopkit.off", default=False)


def off() -> bool:
    """Whether `without_gradients` is around this."""
    return _off.get()


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """Inside, gradients are off, and a graph tells so of what comes out."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


class Telling(TorchFunctionMode):
    """Lets a graph tell what has no gradient: of that it has a view, as its own dtype, which has no derivative.

    make_fx writes down what runs without gradients like any code, and in 2.14 a detached tensor as an alias. What runs
    without gradients has tangents in forward mode, though, and so it has a copy that has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""  # what the graph does not tell
        self._constant = WeakTensorKeyDictionary()
        self._around: FrameType | None = None

    def __enter__(self) -> Telling:
        self._around = sys._getframe(1)
        super().__enter__()  # type: ignore[no-untyped-call] # torch's own
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call] # torch's own
        self._around = None

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in trees.leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.requires_grad for tensor in given) and func not in ASKED:
            self.reason = OPAQUE.get(func, "") or self.reason
        return self.constant(result, given) if gives_constant(func) else result

    def constant(self, result: T, given: Sequence[torch.Tensor]) -> T:
        """``result``, which is computed from the tensors ``given``, as something that has no gradient."""
        if self._by_hand():
            return result
        known = all(tensor in self._constant or not differentiable(tensor) for tensor in given)

        def told(leaf: object) -> object:
            if not differentiable(leaf) or any(leaf is tensor for tensor in given):
                return leaf
            tensor = cast("torch.Tensor", leaf)
            constant = tensor if known else _constant_of(tensor)
            self._constant[constant] = None
            return constant

        return trees.map_leaves(told, result)

    def _by_hand(self) -> bool:
        """Whether a `torch.autograd.Function` computes this. It is torch that has turned gradients off there."""
        inside, frame = set[CodeType](), cast("FrameType | None", sys._getframe(1))
        while frame and frame is not self._around:
            inside.add(frame.f_code)
            frame = frame.f_back
        return not inside.isdisjoint(_forwards())


def _forwards() -> Iterator[CodeType]:
    """The code of the forward of every `torch.autograd.Function`, and of what is decorated in it."""
    pending: list[type] = [torch.autograd.Function]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        function = getattr(kind, "forward", None)
        while isinstance(function, FunctionType):
            yield function.__code__
            function = getattr(function, "__wrapped__", None)


def _constant_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return tensor
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return detached(tensor) if torch.is_grad_enabled() else without_gradient(tensor)


def outcome(result: T, given: object) -> T:
    """``result`` of an operator that no function mode sees, as `Telling` has it if gradients are off."""
    modes = [] if torch.is_grad_enabled() else _get_current_function_mode_stack()
    for mode in reversed(modes):
        if isinstance(mode, Telling):
            return mode.constant(result, trees.tensors(given))
    return result


AS_DETACHED = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""What torch writes for a detached tensor (2.13, 2.14)."""


def is_constant(node: object) -> bool:
    """Whether a node of a graph gives what `Telling` says has no gradient."""
    return isinstance(node, Node) and node.target in CONSTANT
