"""Values of a user's that are alike, piece by piece: types, constants, attributes, what tensors say of themselves."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterable
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hopkit._torch import sizes


class UnlikeError(Exception):
    """Two calls are not alike, or nobody can tell."""


class Likeness:
    """Two structures of values as one and the same, piece by piece; what is shared in one is shared in the other."""

    def __init__(self) -> None:
        self._pairs: dict[int, object] = {}
        self._taken: set[int] = set()

    def __call__(self, old: object, new: object) -> None:
        if type(old) is not type(new):
            raise UnlikeError
        if type(old) in CONSTANTS:
            _equal(old, new)
            return
        if id(old) in self._pairs:
            self.identical(self._pairs[id(old)], new)
            return
        if id(new) in self._taken:
            raise UnlikeError
        self._pairs[id(old)] = new
        self._taken.add(id(new))
        if isinstance(old, torch.Tensor):
            _equal(told(old), told(new))
            if not isinstance(old, FakeTensor):
                self._parts(vars(old), vars(new))
                if old.is_leaf:
                    self(old.grad, cast("torch.Tensor", new).grad)
        elif isinstance(old, torch.nn.Module) and type(old).__basicsize__ == torch.nn.Module.__basicsize__:
            self._parts(vars(old), vars(new))
        elif type(old) in _CONTAINERS:
            self._parts(old, new)
        else:
            self.identical(old, new)

    def _parts(self, old: object, new: object) -> None:
        parts = _items(old), _items(new)
        if len(parts[0]) != len(parts[1]):
            raise UnlikeError
        for pair in zip(*parts, strict=True):
            self(*pair)

    def identical(self, old: object, new: object) -> None:
        """Both are one object."""
        if old is not new:
            raise UnlikeError


def _items(container: object) -> list[object]:
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    if isinstance(container, (set, frozenset)):
        return list[object](sorted(map(told, container)))
    return list(cast("Iterable[object]", container))


def refuse_identity(value: object) -> None:
    """What is looked up outside of a call's own must not know the call's objects."""
    if type(value) in _CONTAINERS:
        for part in _items(value):
            refuse_identity(part)
    elif type(value) not in CONSTANTS and not isinstance(value, _CODE):
        raise UnlikeError


def is_constant(value: object) -> bool:
    """Whether this is a value of a type that holds nothing else."""
    return type(value) in CONSTANTS


def equal(old: object, new: object) -> bool:
    """Whether two constants, symbols or tensors say the same of themselves."""
    try:
        return told(old) == told(new)
    except UnlikeError:
        return False


def _equal(old: object, new: object) -> None:
    if told(old) != told(new):
        raise UnlikeError


def told(value: object) -> str:
    """What a constant, a symbol or a tensor says of itself."""
    if type(value) in CONSTANTS or isinstance(value, sizes.SYMBOLIC):
        return f"{type(value).__name__} {value!r}"
    if type(value) not in _TENSORS:
        raise UnlikeError
    x = cast("torch.Tensor", value)
    if x.layout is not torch.strided or vars(x).get("_item_memo") is not None:
        raise UnlikeError
    where = (*x.shape, "", *x.stride(), "", x.device, x.dtype)
    return " ".join(map(str, (type(x).__name__, *where, x.requires_grad, x.is_leaf)))


CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, type(...), range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset, torch.Size)
_TENSORS = (torch.Tensor, torch.nn.Parameter, FakeTensor)
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch._ops.OpOverloadPacket)
