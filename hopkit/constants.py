"""What an option may be. torch and numpy are known by name, not imported."""

from __future__ import annotations

import dataclasses
import enum
import functools
import numbers
import operator
import types
import typing
from collections.abc import Callable
from typing import cast, get_args, get_origin

import typing_extensions

TENSOR = "torch.Tensor"
SYMBOLS = frozenset({"torch.SymInt", "torch.SymFloat", "torch.SymBool"})

PLAIN: frozenset[type] = frozenset({int, float, bool, str, complex, bytes, type(None)})
"""The types whose every value is a constant."""

UNIONS: tuple[object, ...] = (typing.Union, types.UnionType)
LITERALS: tuple[object, ...] = (typing.Literal, typing_extensions.Literal)  # two where Python's typing is too old

_WITHOUT_VALUE = SYMBOLS | {TENSOR}


def is_constant(value: object) -> bool:
    """Whether ``value`` can be an option's: hashable, and no tensor."""
    if type(value) in PLAIN:
        return True
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    names = qualified_names(type(value))
    if not _WITHOUT_VALUE.isdisjoint(names):
        return TENSOR not in names  # a symbol has no hash, and needs none: whoever records the call specialises it
    try:
        hash(value)
    except TypeError:
        return False
    return True


def plain(value: object) -> object:
    """``value``, or what it is a variety of: the int or float of a numpy number, the tuple of a ``torch.Size``."""
    if type(value) in PLAIN or isinstance(value, enum.Enum):
        return value
    if isinstance(value, tuple):
        items, named = tuple(map(plain, value)), hasattr(value, "_fields")
        if (named or type(value) is tuple) and all(map(operator.is_, items, value)):
            return value
        return cast("Callable[..., object]", type(value))(*items) if named else items
    variety = _variety_of(type(value))
    return value if variety is None else variety(value)


def _variety(cls: type) -> Callable[..., object] | None:
    if not qualified_names(cls).isdisjoint(_NUMPY_BOOL):
        return bool
    return next((make for kind, make in _VARIETIES.items() if issubclass(cls, kind)), None)


_NUMPY_BOOL = {"numpy.bool", "numpy.bool_"}  # Python does not count it among numbers
_VARIETIES: dict[type, Callable[..., object]] = {
    numbers.Integral: int,
    numbers.Real: float,
    numbers.Complex: complex,
    str: str,
    bytes: bytes,
}
_variety_of: Callable[[type], Callable[..., object] | None] = functools.lru_cache(maxsize=256)(_variety)


def allows(hint: object, value: object) -> bool:
    """Whether a plain constant is what ``hint`` says: a class, or a union, a ``Literal`` or a tuple of such."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return any(allows(arg, value) for arg in args)
    if origin in LITERALS:
        return any(type(arg) is type(value) and arg == value for arg in args)
    if origin is not tuple:
        return _is_a(type(value), hint)
    if not isinstance(value, tuple):
        return False
    wanted = args[:1] * len(value) if args[-1] is ... else args
    return len(wanted) == len(value) and all(map(allows, wanted, value))


def ready(hint: object) -> frozenset[type]:
    """Types whose values need no closer look: they are plain constants that ``hint`` allows."""
    if get_origin(hint) in UNIONS:
        return frozenset().union(*map(ready, get_args(hint)))
    if not isinstance(hint, type) or get_origin(hint) or issubclass(hint, tuple) or dataclasses.is_dataclass(hint):
        return frozenset()
    return frozenset(cls for cls in (hint, *PLAIN) if _is_a(cls, hint))


def ready_items(hint: object) -> frozenset[type]:
    """As `ready`, of the items of a tuple of any length."""
    item, *rest = get_args(hint) or (None,)
    return ready(item) if get_origin(hint) is tuple and rest == [...] else frozenset()


def _is_a(cls: type, hint: object) -> bool:
    """Whether Python's typing takes a ``cls`` for a ``hint``; a symbol counts as the number that it stands for."""
    assert isinstance(hint, type)
    return issubclass(cls, hint) or not _ALSO.get(hint, frozenset()).isdisjoint(qualified_names(cls))


_ALSO: dict[type, frozenset[str]] = {
    bool: frozenset({"torch.SymBool"}),
    int: frozenset({"torch.SymInt"}),
    float: frozenset({"builtins.int", "torch.SymInt", "torch.SymFloat"}),
    complex: frozenset({"builtins.int", "builtins.float", "torch.SymInt", "torch.SymFloat"}),
}


def _qualified_names(cls: type) -> frozenset[str]:
    return frozenset(f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)


qualified_names: Callable[[type], frozenset[str]] = functools.lru_cache(maxsize=256)(_qualified_names)
"""The names of a class and its bases, with their modules."""
