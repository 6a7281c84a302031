"""Functionalization's side of an op (torch/_subclasses/functional_tensor.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch._C import DispatchKey
from torch._C._functorch import TransformType
from torch._subclasses.functional_tensor import (
    CppFunctionalizeAPI,
    FunctionalTensor,
    FunctionalTensorMode,
    FunctorchFunctionalizeAPI,
    PythonFunctionalizeAPI,
)

from hopkit._torch.operator import Kernel, Key


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


def kernels(rule: Callable[..., object]) -> dict[Key, Kernel]:
    """``rule(functionalizer, *args)`` under torch's three entries."""
    return {
        DispatchKey.Functionalize: lambda *args, **kwargs: rule(CppFunctionalizeAPI(), *args, **kwargs),
        FunctionalTensorMode: lambda mode, /, *args, **kwargs: rule(PythonFunctionalizeAPI(mode), *args, **kwargs),
        TransformType.Functionalize: lambda layer, /, *args, **kwargs: rule(
            FunctorchFunctionalizeAPI(layer), *args, **kwargs
        ),
    }


def frozen(value: object) -> object:
    """A tensor of AOTAutograd's as it is now: what is written to it later is not seen."""
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)
    return FunctionalTensor.to_functional(torch._from_functional_tensor(value.elem))
