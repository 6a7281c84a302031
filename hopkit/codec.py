"""Pytrees, constants and sizes as one JSON text: what a graph node's ``hopkit=`` keyword is written in."""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import json
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch

from hopkit.errors import LayoutError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A leaf that is passed beside the text: input, argument or output number ``index``."""

    index: int


def dumps(value: object) -> str:
    """``value`` as text.

    Raises:
        LayoutError: It holds something that no text stands for.
    """
    return json.dumps(_encode(value), separators=(",", ":"))


def loads(text: str, read: Callable[[object], T]) -> T:
    """What ``read`` makes of the value that `dumps` wrote.

    Raises:
        LayoutError: The text is damaged, or names a class that is not installed.
    """
    try:
        return read(_decode(json.loads(text)))
    except (ValueError, LookupError, TypeError, ImportError, AttributeError) as error:
        raise LayoutError(
            "hopkit=",
            f"cannot be read ({error})",
            why="it says how the node's tensors make up the op's arguments",
            todo="Record the graph again with the packages that are installed here",
        ) from error


def names_classes(text: str) -> bool:
    """Whether what `dumps` wrote names classes, which are looked up when it is read."""
    return any(f'["{tag}"' in text for tag in ("enum", "namedtuple", "dataclass"))


# A JSON list starts with its tag; everything else stands for itself.
def _encode(value: object) -> object:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Slot):
        return ["$", value.index]
    if type(value) is float:
        return ["float", value.hex()]
    if type(value) is complex:
        return ["complex", value.real.hex(), value.imag.hex()]
    if type(value) is bytes:
        return ["bytes", value.hex()]
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return ["torch", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, enum.Enum):
        return ["enum", _path(type(value)), value.name]
    if type(value) in _SEQUENCES:
        return [_SEQUENCES[type(value)], *map(_encode, cast("tuple[object, ...]", value))]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ["namedtuple", _path(type(value)), *map(_encode, value)]
    if type(value) in _MAPPINGS:
        items = cast("dict[object, object]", value).items()
        return [_MAPPINGS[type(value)], *([_encode(k), _encode(v)] for k, v in items)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return ["dataclass", _path(type(value)), fields]
    raise LayoutError(
        f"a {type(value).__qualname__}",
        f"cannot be written into a graph: {value!r}",
        why="a recorded node keeps its constants and containers as text",
        todo="Use numbers, strings, dtypes, devices, enums, tuples, lists, dicts, named tuples or dataclasses",
    )


_SEQUENCES: dict[type, str] = {tuple: "tuple", list: "list"}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "odict"}


def _decode(data: object) -> object:
    if not isinstance(data, list):
        return data
    tag, *rest = data
    return _DECODERS[tag](rest)


def _decode_class(rest: list[object]) -> object:
    path, fields = cast("tuple[str, dict[str, object]]", rest)
    return _named(path)(**{name: _decode(v) for name, v in fields.items()})


_DECODERS: dict[object, Callable[[list[object]], object]] = {
    "$": lambda rest: Slot(cast("int", rest[0])),
    "float": lambda rest: float.fromhex(cast("str", rest[0])),
    "complex": lambda rest: complex(*(float.fromhex(cast("str", r)) for r in rest)),
    "bytes": lambda rest: bytes.fromhex(cast("str", rest[0])),
    "torch": lambda rest: getattr(torch, cast("str", rest[0])),
    "device": lambda rest: torch.device(cast("str", rest[0])),
    "enum": lambda rest: getattr(_named(cast("str", rest[0])), cast("str", rest[1])),
    "tuple": lambda rest: tuple(map(_decode, rest)),
    "list": lambda rest: list(map(_decode, rest)),
    "namedtuple": lambda rest: _named(cast("str", rest[0]))(*map(_decode, rest[1:])),
    "dict": lambda rest: {_decode(k): _decode(v) for k, v in cast("list[tuple[object, object]]", rest)},
    "odict": lambda rest: OrderedDict((_decode(k), _decode(v)) for k, v in cast("list[tuple[object, object]]", rest)),
    "dataclass": _decode_class,
}


def _path(kind: type) -> str:
    path = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found: object = _named(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not kind:
        raise LayoutError(
            f"class {kind.__qualname__}",
            f"cannot be found as {path}",
            why="a recorded node names the class, so that another process can find it",
            todo="Define it at the top of a module",
        )
    return path


def _named(path: str) -> Callable[..., object]:
    module, _, qualname = path.partition(":")
    found: object = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, (enum.Enum, tuple)))):
        raise ValueError(f"{path} is no enum, dataclass or named tuple")
    return found


# -- sizes -----------------------------------------------------------------------------------------------------------

Dim = int | str
"""A size: a number, or an expression over the symbols that the op's inputs bind; ``"?"`` where none can be given."""

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
}


def evaluate(expression: str, symbols: Mapping[str, int]) -> int | None:
    """The size that ``expression`` stands for, or None where a symbol is unbound or a function is unknown.

    Python's own ``eval`` would run whatever a file from elsewhere says; this runs integer arithmetic.
    """

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name):
                return symbols[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return _BINARY[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return _CALLS[name](*map(value, args))
        raise KeyError(expression)

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, KeyError):
        return None
