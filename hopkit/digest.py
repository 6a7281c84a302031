"""What an op means, as a short text: the same in every process, and another once the meaning may be another.

Caches of compiled code go by it, and so does the warning that a node was recorded with another body. What cannot be
known to be the same is not guessed: then there is no digest, and no code that was compiled with the op may be cached.
"""

from __future__ import annotations

import abc
import builtins
import collections
import ctypes
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, cast

import torch

from hopkit.rule import Place, Table
from hopkit.spec import OpSpec

REVISION = 7
"""Raise it when a rule that hopkit derives, or the way it traces a body, gives other values, gradients or graphs."""

MOST_ITEMS = 10_000
MOST_BYTES = 16 * 1024
"""What a container and a tensor may hold; reading more would take longer than compiling again."""


def digest(spec: OpSpec, table: Table) -> str | None:
    """The digest of an op, or None where it reaches something that cannot be hashed.

    It has three parts. The first is Python's bytecode version. The second is what the author has written: declaration,
    body, and the code and constants that these reach where no version stands for them. The third is all the rest: rules
    that are not built in, the present state of what can change, and the versions of what is installed and reached.

    Args:
        spec: The op.
        table: Who answers for it.
    """
    written = _Reader(deferring=True)
    rest = _Reader(written.own)
    try:
        written.op(spec, table)
        while written.tables or written.state:
            for value in _emptied(written.state):
                rest.add(value)
            for value in _emptied(written.tables):
                rest.table(value)
            written.tables += _emptied(rest.tables)
    except Exception:  # `Unhashable`, or whatever an object raises that is looked at
        return None
    rest.write(
        REVISION, _version("hopkit"), written.docstrings + rest.docstrings, sorted(written.versions | rest.versions)
    )
    return f"{_BYTECODE}-{written.text(12)}-{rest.text(8)}"


def other_body(recorded: str, today: str) -> bool:
    """Whether the author has written something else since. The bytecodes of two Pythons cannot be compared."""
    then, now = recorded.split("-"), today.split("-")
    return then[0] == now[0] and then[1:2] != now[1:2]


def cacheable(spec: OpSpec) -> bool:
    """Whether torch may cache what it compiles of an op that has a digest."""
    settled = spec.pure and not (spec.effectful or spec.random)
    # A body that decides on values is called back by a name that this process alone knows (hopkit/install.py).
    inlined = spec.outputs is None
    # A node without a layout has no digest (`hopkit.record.plain_form`).
    dated = spec.autograd == "derive" or not any(p.graph_only for p in spec.parameters)
    return settled and inlined and dated


class Unhashable(Exception):
    """An op reaches something that no text stands for."""


class _Reader:
    """Writes values, and all that they reach, into one hash.

    Args:
        own: The packages that are read though they have a version.
        deferring: Leave out what can change while the process runs; it is then listed in ``state``.
    """

    def __init__(self, own: set[str] | None = None, *, deferring: bool = False) -> None:
        self.own = set() if own is None else own
        self.state: list[object] = []
        self.tables: list[Table] = []
        self.versions: set[str] = set()
        self.docstrings: list[str] = []
        self._deferring = deferring
        self._hash = hashlib.sha256()
        self._seen: dict[tuple[int, ...], int] = {}
        self._kept: list[object] = []  # an id is an object's own only while the object lives

    def write(self, *atoms: object) -> None:
        """Add plain values: what ``repr`` tells apart."""
        self._hash.update(repr(atoms).encode())

    def text(self, length: int) -> str:
        """The hash, in hexadecimal digits."""
        return self._hash.hexdigest()[:length]

    def op(self, spec: OpSpec, table: Table) -> None:
        """Add an op: what its author has declared and written, but for the examples. Its rules are added by `table`."""
        if self._again(spec):
            return
        self.tables.append(table)
        self.write(spec.name, spec.autograd, spec.pure, spec.mutates, spec.aliases)
        self.write(spec.effectful, spec.random, spec.outline)
        for p in spec.parameters:
            self.write(p.name, p.kind.value, p.annotation, p.passing.name, p.graph_only)
            self.add(p.default)
        self._own(spec.body)
        for function in (spec.body, spec.inputs, spec.outputs):
            self.add(function)

    def table(self, table: Table) -> None:
        """Add the rules that are not built in."""
        for mode in sorted(table):
            for answer in table[mode]:
                if answer.place is not Place.BUILTIN:
                    version = "" if answer.place is Place.AUTHOR else _plugins().get(answer.plugin, "")
                    self.write(mode, answer.place.name, answer.plugin, version, answer.device)
                    self._own(answer.rule)
                    self.add(answer.rule)

    def _own(self, function: Any) -> None:
        while isinstance(function, (functools.partial, types.MethodType)):
            function = function.func if isinstance(function, functools.partial) else function.__func__
        top = _top(getattr(function, "__module__", None))
        if top not in {"torch", "hopkit", *sys.stdlib_module_names}:
            self.own.add(top)

    # -- any value ---------------------------------------------------------------------------------------------------

    def add(self, value: object) -> None:
        """Add a value, and all that it reaches.

        Raises:
            Unhashable: Nobody can tell what it stands for.
        """
        kind = type(value)
        if kind in _PLAIN:
            self.write(kind.__name__, value)
        elif isinstance(value, _OF_TORCH):
            self.write(kind.__name__, str(value))
            self.versions.add(_TORCH)
        elif isinstance(value, _BUILT_IN):
            self._built_in(value)
        elif isinstance(value, types.ModuleType):
            self._named(value.__name__, "")
        elif isinstance(value, enum.Enum):
            self._parts(kind, value.name)
        elif isinstance(value, tuple):
            self._parts(kind, *value)
        elif kind in _HOLDERS:
            self._parts(kind, *(getattr(value, name) for name in _HOLDERS[kind]))
        elif not self._again(value):
            self._object(value)

    def _again(self, *value: object) -> bool:
        """Whether this was added before; cycles end here."""
        key = tuple(map(id, value))
        if key in self._seen:
            self.write("again", self._seen[key])
            return True
        self._seen[key] = len(self._seen)
        self._kept.append(value)
        return False

    def _parts(self, kind: type, *parts: object) -> None:
        self.write(len(parts))
        self.add(kind)
        for part in parts:
            self.add(part)

    def _object(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(inspect.getattr_static(value, "spec", None), OpSpec):
            if not cacheable(value.spec):
                raise Unhashable(f"op '{value.spec.name}' is not the same each time")
            self.op(value.spec, value.table)
        elif self._deferring:
            self.add(type(value))
            self.state.append(value)
        elif isinstance(value, torch.Tensor):
            self._tensor(value)
        elif type(value) in _CONTAINERS:
            self._container(value)
        else:
            self._instance(value)

    # -- functions ---------------------------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> None:
        if self._version(function.__module__) and _found(function):
            self._named(function.__module__, function.__qualname__)
            return
        documented = function.__doc__ is not None and function.__code__.co_consts[:1] == (function.__doc__,)
        if documented:
            self.docstrings.append(cast("str", function.__doc__))
        code = _read(function.__code__, documented)
        self.write(code.text)
        self.add(function.__defaults__)
        self.add(tuple((function.__kwdefaults__ or {}).items()))
        if vars(function):
            self.add(vars(function))
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                self.write("empty")
            else:
                self._reached(content, code)
        if version := self._version(function.__globals__.get("__name__")):
            self.versions.add(version)  # a wrapper that somebody else's decorator has made
        else:
            self._scope(code, function.__globals__)

    def _scope(self, code: _Code, scope: Mapping[str, Any]) -> None:
        for name in code.variables:
            self.write(name)
            if name in scope:
                self._reached(scope[name], code, bare=name in code.bare)
            elif name in _DYNAMIC:
                raise Unhashable(f"{name}() may reach anything")
            elif not hasattr(builtins, name):
                self.write("unbound")
        for level, name in code.imports:
            module = importlib.util.resolve_name("." * level + name, scope.get("__package__"))
            if version := self._version(module):
                self.versions.add(version)
            else:
                self._reached(importlib.import_module(module), code)

    def _reached(self, value: object, code: _Code, *, bare: bool = False) -> None:
        """Add what code reaches by a name. Of a module it is only what the code takes from it."""
        if not isinstance(value, types.ModuleType) or self._version(value.__name__):
            self.add(value)
        elif bare or "__getattr__" in vars(value):
            raise Unhashable(f"what is taken from module {value.__name__} cannot be told")
        elif not self._again(value, code):
            for name in sorted(code.names.intersection(vars(value))):
                self.write(name)
                self._reached(vars(value)[name], code)

    # -- classes, and their instances --------------------------------------------------------------------------------

    def _class(self, cls: type) -> None:
        if self._version(cls.__module__):
            self._named(cls.__module__, cls.__qualname__)
            return
        self._parts(type(cls), *cls.__bases__)
        members = {name: value for name, value in vars(cls).items() if name not in _NO_MEANING}
        if issubclass(cls, enum.Enum):
            self.add(tuple((name, member.value) for name, member in cls.__members__.items()))
            members = {name: value for name, value in members.items() if isinstance(value, _METHODS)}
        for name in sorted(members):
            self.write(name)
            if not isinstance(members[name], _FIELDS):
                self.add(members[name])

    def _instance(self, value: Any) -> None:
        kind = type(value)
        if issubclass(kind, (torch.no_grad, torch.enable_grad)):
            self.add(kind)
        elif dataclasses.is_dataclass(kind):
            self._parts(kind, *(getattr(value, field.name) for field in dataclasses.fields(kind)))
        elif any(self._version(cls.__module__) for cls in kind.__mro__ if cls not in _STATELESS):
            raise Unhashable(f"a {kind.__module__}.{kind.__qualname__} may hold anything")
        else:
            slots = [name for cls in kind.__mro__ for name in _slots(cls) if hasattr(value, name)]
            self._parts(kind, getattr(value, "__dict__", None), *((name, getattr(value, name)) for name in slots))

    # -- values ------------------------------------------------------------------------------------------------------

    def _container(self, value: Any) -> None:
        if len(value) > MOST_ITEMS:
            raise Unhashable(f"a {type(value).__name__} of {len(value)} items")
        if isinstance(value, Mapping):
            self._parts(type(value), *value.items())
        elif isinstance(value, (set, frozenset)):  # in an order that every process has
            self.write(type(value).__name__, sorted(map(self._alone, value)))
        else:
            self._parts(type(value), *value)

    def _alone(self, value: object) -> str:
        reader = _Reader(self.own)
        reader.add(value)
        self.versions |= reader.versions
        self.tables += reader.tables
        return reader.text(64)

    def _tensor(self, tensor: torch.Tensor) -> None:
        if type(tensor) is not torch.Tensor or tensor.requires_grad or tensor.layout is not torch.strided:
            raise Unhashable("a tensor that is more than its values")
        if tensor.device.type != "cpu" or tensor.is_quantized:
            raise Unhashable("a tensor whose values are elsewhere")
        try:
            storage = tensor.untyped_storage()
            if storage.nbytes() > MOST_BYTES:
                raise Unhashable("a large tensor")
            content = ctypes.string_at(storage.data_ptr(), storage.nbytes())
        except RuntimeError as error:  # a wrapper of torch.func's
            raise Unhashable("a tensor without values of its own") from error
        self.write(str(tensor.dtype), tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        self.write(tensor.is_conj(), tensor.is_neg(), content)

    # -- what a name and a version stand for -------------------------------------------------------------------------

    def _built_in(self, value: Any) -> None:
        owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, (type, types.ModuleType)):
            self.add(owner)  # a method of an instance, such as a dict's
            owner = type(owner)
        self._named(getattr(value, "__module__", None) or owner.__module__, value.__qualname__)

    def _named(self, module: str, name: str) -> None:
        version = _version(_top(module))
        if not version:
            raise Unhashable(f"{module}.{name} has neither code nor a version")
        self.write(module, name)
        self.versions.add(version)

    def _version(self, module: str | None) -> str:
        """The version that stands for a module; "" for one that is read instead."""
        top = _top(module)
        return "" if top in self.own else _version(top)


def _emptied(values: list[Any]) -> Iterator[Any]:
    """The values, taken out of their list."""
    while values:
        yield values.pop(0)


# -- code ------------------------------------------------------------------------------------------------------------


class _Code(NamedTuple):
    """A code object, with those inside it.

    Args:
        text: What it does, without line numbers, file names and the docstring.
        variables: The globals that it reads.
        imports: What it imports: levels up, and name.
        names: Every name in it, attributes' too.
        bare: Globals of which it reads more than attributes.
    """

    text: str
    variables: tuple[str, ...]
    imports: tuple[tuple[int, str], ...]
    names: frozenset[str]
    bare: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _read(code: types.CodeType, documented: bool = False) -> _Code:
    constants = code.co_consts[documented:]
    inner = [_read(constant) for constant in constants if isinstance(constant, types.CodeType)]
    does = (code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)
    takes = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    handlers = getattr(code, "co_exceptiontable", b"")  # Python 3.10 has them in the code itself
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    loads = [i for i, step in enumerate(steps) if step.opname in _GLOBALS]
    imports = [i for i, step in enumerate(steps) if step.opname == "IMPORT_NAME"]
    return _Code(
        repr((does, takes, handlers, [_constant(constant) for constant in constants])),
        tuple(dict.fromkeys([*(steps[i].argval for i in loads), *(name for c in inner for name in c.variables)])),
        (*((steps[i - 2].argval, steps[i].argval) for i in imports), *(found for c in inner for found in c.imports)),
        frozenset(code.co_names).union(*(c.names for c in inner)),
        frozenset(steps[i].argval for i in loads if steps[i + 1].opname not in _ATTRIBUTES).union(
            *(c.bare for c in inner)
        ),
    )


def _constant(value: object) -> object:
    if isinstance(value, types.CodeType):
        return _read(value).text
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


_BYTECODE = importlib.util.MAGIC_NUMBER[:2].hex()
_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_DYNAMIC = ("__import__", "eval", "exec", "globals")


# -- versions --------------------------------------------------------------------------------------------------------

_PYTHON = f"python=={sys.version_info[0]}.{sys.version_info[1]}"
_TORCH = f"torch=={torch.__version__}"


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]  # what `exec` makes may have none


@functools.cache
def _version(top: str) -> str:
    """The version of what is installed as ``top``; "" where there is none, or the source is not the installed one."""
    if top in ("", "torch"):
        return top and _TORCH
    if top == "hopkit":  # its own source counts as installed: `REVISION` stands for it
        return f"{top}=={metadata.version(top)}"
    file = getattr(sys.modules.get(top), "__file__", None)
    if top in sys.stdlib_module_names:
        return _PYTHON if file is None or Path(file).is_relative_to(sysconfig.get_path("stdlib")) else ""
    for name in metadata.packages_distributions().get(top, ()):
        found = metadata.distribution(name)
        folder = Path(str(found.locate_file("")))
        if file and folder.name in ("site-packages", "dist-packages") and Path(file).is_relative_to(folder):
            return f"{name}=={found.version}"
    return ""


@functools.cache
def _plugins() -> dict[str, str]:
    """The versions of the installed plugins, by name."""
    found = metadata.entry_points(group="hopkit")
    return {entry.name: f"{entry.dist.name}=={entry.dist.version}" for entry in found if entry.dist}


def _found(function: types.FunctionType) -> bool:
    """Whether its name leads to it."""
    value: object = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        value = getattr(value, part, None)
    return value is function


# -- kinds of values -------------------------------------------------------------------------------------------------

_PLAIN = {bool, int, float, complex, str, bytes, range, type(None), type(...), type(NotImplemented)}
_OF_TORCH = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    # An operator is a name in the graph, whatever its kernel does.
    type(torch.ops.aten.add),
    type(torch.ops.aten.add.Tensor),
    torch.library.CustomOpDef,
)
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
)
_HOLDERS: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    functools.cached_property: ("func",),
    functools.partial: ("func", "args", "keywords"),
    type(_version): ("__wrapped__",),
    slice: ("start", "stop", "step"),
    types.SimpleNamespace: ("__dict__",),
}
_CONTAINERS = (list, collections.deque, set, frozenset, dict, collections.OrderedDict, types.MappingProxyType)
_METHODS = (types.FunctionType, staticmethod, classmethod, property)
_FIELDS = (types.GetSetDescriptorType, types.MemberDescriptorType, type(vars(_Code)["text"]))
_STATELESS = (object, Generic, Protocol, abc.ABC)
_NO_MEANING = {
    *("__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__", "__dict__", "__weakref__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__orig_bases__"),
    *("__parameters__", "__type_params__", "__abstractmethods__", "_abc_impl"),
    *("__dataclass_fields__", "__dataclass_params__"),
}


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
