"""Modes and a tensor subclass that change nothing, for tests of what a user brings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hopkit._torch import trees
from hopkit.extend.mode import TorchDispatchMode


class Passing(TorchDispatchMode):
    """A dispatch mode that changes nothing.

    Args:
        whole: Whether it takes any operator whole.
    """

    def __init__(self, whole: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.supports_higher_order_operators = whole

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Names(Passing):
    """Writes down what it sees; operators on functions too, where it takes them whole."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__(whole)
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Looking(TorchFunctionMode):
    """A torch-function mode that changes nothing."""

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Boxed(Tensor):
    """A wrapper subclass."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Boxed:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, requires_grad=held.requires_grad
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override] # torch's own takes an option
        return f"Boxed({self.held})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: object, size: object, stride: object) -> Boxed:
        return Boxed(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:  # type: ignore[override] # torch's stub leaves out the operator
        inner: Any = trees.map_only(Boxed, lambda t: t.held, (args, dict(kwargs or {})))
        return trees.map_only(Tensor, Boxed, func(*inner[0], **inner[1]))
