"""What the parameters of a body are, read from its annotations. torch is known by name, and never imported."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import enum
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import GenericAlias
from typing import Annotated, ForwardRef, NamedTuple, TypeGuard, TypeVar, cast, get_args, get_origin

import typing_extensions

from hopkit.binding import GRAPH_MODULE, misfit
from hopkit.constants import LITERALS, PLAIN, SYMBOLS, TENSOR, UNIONS, plain, qualified_names
from hopkit.errors import SpecError
from hopkit.spec import Kind, Parameter, Subgraph

_SETTINGS = {"torch.dtype", "torch.device", "torch.layout", "torch.memory_format"}

_SEQUENCES: set[type] = {tuple, list, collections.abc.Sequence}
_MAPPINGS: set[type] = {dict, collections.abc.Mapping, collections.OrderedDict, collections.defaultdict}
_TREES = _SEQUENCES | _MAPPINGS | {collections.deque}
_MUTABLE = (list, dict, set, bytearray, collections.deque)
_CALLABLE: object = collections.abc.Callable
_SETS: tuple[object, ...] = (set, frozenset, collections.abc.Set)

# typing_extensions has forms of its own where Python's typing is too old: Any on 3.10, type aliases before 3.14.
_ANYTHING: tuple[object, ...] = (object, typing.Any, typing_extensions.Any)
_ALIASES = (typing_extensions.TypeAliasType, getattr(typing, "TypeAliasType", typing_extensions.TypeAliasType))


def _never(_: type) -> bool:
    return False


def parse(
    body: Callable[..., object],
    localns: Mapping[str, object] | None = None,
    is_pytree: Callable[[type], bool] = _never,
) -> tuple[Parameter, ...]:
    """The parameters of ``body``, each with what its annotation says that it is.

    Args:
        body: An op's body: anything that ``inspect.signature`` reads.
        localns: Names that string annotations may use besides the body's own globals and closure.
        is_pytree: Whether torch knows a class as a node of a pytree.

    Raises:
        SpecError: A parameter is missing an annotation, or has one that fits no kind; or there is no subgraph.
    """
    who = f"op body '{getattr(body, '__qualname__', type(body).__qualname__)}'"
    if kind := _suspended(body):
        raise SpecError(
            who,
            f"is {kind}",
            why="calling it runs nothing of it, and an op's body is run by calling it",
            todo="Write a plain `def` that returns its result; for several results, a tuple",
        )
    try:
        signature = inspect.signature(body)
    except (TypeError, ValueError) as error:
        raise SpecError(
            who,
            f"has no signature to read ({error})",
            why="an op takes what its body takes",
            todo="Wrap it in a function: `def body(f: hopkit.Subgraph, x: torch.Tensor) -> torch.Tensor: ...`",
        ) from error
    function = _function(body)
    scope = collections.ChainMap(_closure(function), dict(localns or {}), getattr(function, "__globals__", {}))
    parameters = tuple(_Reader(who, p.name, scope, is_pytree).read(p) for p in signature.parameters.values())
    if not any(p.kind in (Kind.SUBGRAPH, Kind.SUBGRAPHS) for p in parameters):
        raise SpecError(
            who,
            "takes no subgraph",
            why="an op of hopkit carries at least one callable, and calls it",
            todo="Annotate the callable, `f: hopkit.Subgraph`; an op of tensors alone is a `torch.library.custom_op`",
        )
    return parameters


def shorten(annotation: object) -> str:
    """An annotation as its author would write it: ``tuple[Tensor, ...]``."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    written = annotation.strip("'\"") if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _NOISE.sub(lambda match: match["literal"] or match["forward"] or "", written)


# A quoted literal stays; a forward reference is its text; a module's name and the variance of a TypeVar go.
_NOISE = re.compile(
    r"""ForwardRef\('(?P<forward>[^']*)'[^)]*\) | (?P<literal>'[^']*'|"[^"]*")
    | (?<![\w.])(?:(?:[^\W\d]\w*|<locals>)\.)+(?=[^\W\d]) | (?<!\w)[~+-](?=[^\W\d])""",
    re.VERBOSE,
)


def _suspended(body: object) -> str:
    """What a function is that waits to be driven; "" for a plain one."""
    for function in (body, type(body).__call__):
        if inspect.iscoroutinefunction(function):
            return "a coroutine (`async def`)"
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            return "a generator (it yields)"
    return ""


def _function(body: object) -> object:
    """The plain function (or method) whose scope the annotations of ``body`` were written in."""
    while isinstance(body, functools.partial) or hasattr(body, "__wrapped__"):
        body = body.func if isinstance(body, functools.partial) else body.__wrapped__
    return body if hasattr(body, "__globals__") else type(body).__call__


def _closure(function: object) -> dict[str, object]:
    found: dict[str, object] = {p.__name__: p for p in getattr(function, "__type_params__", ())}
    code = getattr(function, "__code__", None)
    for name, cell in zip(code.co_freevars if code else (), getattr(function, "__closure__", None) or (), strict=False):
        with contextlib.suppress(ValueError):  # a cell that is still empty
            found[name] = cell.cell_contents
    return found


class _Sort(NamedTuple):
    """What an annotation says. The fields are those of `Parameter`."""

    kind: Kind
    graph_only: bool = False
    accepts: object = object


class _Refusal(NamedTuple):
    """Why an annotation says nothing. Within an operand it does no harm: there it is a static leaf."""

    why: str
    todo: str


_Verdict = _Sort | _Refusal

_SUBGRAPH, _OPERAND = _Sort(Kind.SUBGRAPH), _Sort(Kind.OPERAND)


def _option(accepts: object = object) -> _Sort:
    return _Sort(Kind.OPTION, accepts=accepts)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads one parameter.

    Args:
        who: The body, for messages.
        name: The parameter, without its stars.
        scope: What the names in string annotations stand for.
        is_pytree: Whether torch knows a class as a node of a pytree.
    """

    who: str
    name: str
    scope: Mapping[str, object]
    is_pytree: Callable[[type], bool]

    def read(self, p: inspect.Parameter) -> Parameter:
        """The parameter as it is written, with its kind."""
        if p.kind is p.VAR_KEYWORD:
            raise self._error(
                "takes any keyword",
                "a graph's node needs to know what each argument is",
                f"Name them, `*, scale: float = 1.0`, or take one operand: `{p.name}: dict[str, torch.Tensor]`",
            )
        star = "*" if p.kind is p.VAR_POSITIONAL else ""
        if p.annotation is p.empty:
            raise self._error(
                "has no annotation",
                "the annotation says whether it is a subgraph, an operand or an option",
                f"Write `{star}{p.name}: torch.Tensor`, `{star}{p.name}: hopkit.Subgraph` or, for a constant, "
                f"`{star}{p.name}: float`",
            )
        text = shorten(p.annotation)
        verdict = self._variadic(p.annotation) if star else self._verdict(p.annotation)
        if isinstance(verdict, _Refusal):
            raise self._error(f"is annotated '{text}', which is no subgraph, no operand and no option", *verdict)
        parameter = Parameter(p.name, verdict.kind, text, p.kind, p.default, verdict.graph_only, verdict.accepts)
        if p.default is not p.empty and (bad := misfit(parameter, plain(p.default))):
            raise self._error(f"has a default that does not fit: {bad.found}", bad.why, bad.todo)
        if isinstance(plain(p.default), _MUTABLE):
            raise self._error(
                f"has the default {p.default!r}, which can be changed",
                "all calls share it, and would see what one of them puts in",
                f"Write a tuple, or `{p.name}: {text} | None = None` and make it in the body",
            )
        return parameter

    def _variadic(self, annotation: object) -> _Verdict:
        verdict = self._verdict(annotation)
        if verdict == self._anything():
            return _Refusal(
                "anything may stand there, subgraphs too",
                f"Write `*{self.name}: torch.Tensor`, `*{self.name}: hopkit.Subgraph`, or take one pytree: "
                f"`{self.name}: tuple[object, ...]`",
            )
        if isinstance(verdict, _Sort) and verdict.kind is Kind.SUBGRAPH:
            return verdict._replace(kind=Kind.SUBGRAPHS)
        if isinstance(verdict, _Sort) and verdict.kind is Kind.SUBGRAPHS:
            raise self._mixture()
        return _option(GenericAlias(tuple, (verdict.accepts, ...))) if _is_option(verdict) else verdict

    def _verdict(self, annotation: object, seen: frozenset[object] = frozenset()) -> _Verdict:
        # ``seen`` holds the names and classes that are being read: a recursive one adds nothing to itself.
        if isinstance(annotation, ForwardRef):
            annotation = annotation.__forward_arg__
        if isinstance(annotation, str):
            if annotation in seen:
                return _option()
            return self._verdict(self._resolve(annotation), seen | {annotation})
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return self._verdict(args[0], seen)
        if isinstance(alias := origin or annotation, _ALIASES):
            if alias in seen:
                return _option()
            return self._verdict(_substitute(alias.__value__, alias.__type_params__, args), seen | {alias})
        if isinstance(annotation, typing.NewType):
            return self._verdict(annotation.__supertype__, seen)
        if isinstance(annotation, TypeVar):
            bound = () if annotation.__bound__ is None else (annotation.__bound__,)
            members = annotation.__constraints__ or bound
            return self._union(members, seen) if members else _OPERAND
        if origin in UNIONS:
            return self._union(args, seen)
        if origin in LITERALS:
            return _option(annotation)
        if annotation is None:
            return _option(type(None))
        if _is_anything(annotation):
            return self._anything()
        cls = origin or annotation
        if not isinstance(cls, type):
            return self._unknown(annotation)
        if cls in seen:
            return _option(cls)
        return self._class(cls, annotation, args, seen)

    def _union(self, members: Iterable[object], seen: frozenset[object]) -> _Verdict:
        verdicts = [self._verdict(member, seen) for member in members]
        verdict = _subgraphs(verdicts, Kind.SUBGRAPH) or self._join(verdicts)
        if not _is_option(verdict):
            return verdict
        return _option(typing.Union[_accepted(verdicts)])  # noqa: UP007 (`|` joins two)

    def _part(self, annotation: object, seen: frozenset[object]) -> _Verdict:
        """What is said of a part of a pytree, where anything may stand."""
        verdict = self._verdict(annotation, seen)
        return _OPERAND if verdict == self._anything() else verdict

    def _class(self, cls: type, annotation: object, args: tuple[object, ...], seen: frozenset[object]) -> _Verdict:
        names = qualified_names(cls)
        if GRAPH_MODULE in names:
            return _Sort(Kind.SUBGRAPH, graph_only=True)
        if cls is _CALLABLE or Subgraph in cls.__mro__:
            return _SUBGRAPH
        if TENSOR in names or not SYMBOLS.isdisjoint(names):
            return _OPERAND
        if cls in PLAIN or not _SETTINGS.isdisjoint(names) or issubclass(cls, enum.Enum):
            return _option(cls)
        if cls in _TREES:
            return self._tree(cls, args, seen)
        if self.is_pytree(cls):
            return _OPERAND
        fields = _field_names(cls)
        if fields is None:
            return self._unknown(annotation)
        hints = self._hints(cls)
        parameters = getattr(cls, "__parameters__", ())
        parts = [_substitute(hints.get(field, object), parameters, args) for field in fields]
        verdict = self._join([self._part(part, seen | {cls}) for part in parts])
        if not _is_option(verdict):
            return verdict
        if not issubclass(cls, tuple) and not _is_frozen(cls):
            how = f"Freeze {cls.__name__}: `@dataclasses.dataclass(frozen=True)`"
            return _Refusal(f"{cls.__name__} holds only constants, and may change after it was recorded", how)
        return _option(cls)

    def _tree(self, cls: type, args: tuple[object, ...], seen: frozenset[object]) -> _Verdict:
        items = [arg for arg in args if arg is not ... and arg != ()]  # typing.Tuple[()] has the item () on Python 3.10
        if not items:
            return _OPERAND
        verdicts = [self._part(item, seen) for item in items]
        verdict = (_subgraphs(verdicts, Kind.SUBGRAPHS) if cls in _SEQUENCES else None) or self._join(verdicts)
        if not _is_option(verdict):
            return verdict
        if cls is tuple:
            return _option(GenericAlias(tuple, (*_accepted(verdicts), *(... for arg in args if arg is ...))))
        inner = ", ".join(map(shorten, items))
        return _Refusal(
            f"a {cls.__name__} of constants may change after it was recorded, and has no hash",
            f"Write `{self.name}: tuple[{f'tuple[{inner}]' if len(items) > 1 else inner}, ...]`",
        )

    def _join(self, verdicts: Sequence[_Verdict]) -> _Verdict:
        """What a value is that holds, or may be, all of these."""
        if any(isinstance(v, _Sort) and v.kind in (Kind.SUBGRAPH, Kind.SUBGRAPHS) for v in verdicts):
            raise self._mixture()
        if _OPERAND in verdicts:
            return _OPERAND
        return next((v for v in verdicts if isinstance(v, _Refusal)), _option())

    def _mixture(self) -> SpecError:
        return self._error(
            "is, or holds, a subgraph and something else",
            "a subgraph is called, and nothing else can stand in its place or travel with it",
            f"Write `{self.name}: hopkit.Subgraph`, or `{self.name}: tuple[hopkit.Subgraph, ...]` for any number of "
            "them, none included, and give what is no subgraph a parameter of its own",
        )

    def _anything(self) -> _Refusal:
        return _Refusal(
            "anything may stand there: what the op calls, what it transforms or what it writes into the graph",
            f"Write `{self.name}: torch.Tensor`, `{self.name}: tuple[object, ...]` (or list, dict) for any pytree, "
            f"`{self.name}: hopkit.Subgraph` for what the op calls, or `{self.name}: float` for a constant",
        )

    def _unknown(self, annotation: object) -> _Refusal:
        if (get_origin(annotation) or annotation) in _SETS:
            inner = ", ".join(map(shorten, get_args(annotation))) or "object"
            return _Refusal("a set has no order to record it in", f"Write `{self.name}: tuple[{inner}, ...]`")
        return _Refusal(
            f"a mode must know whether to call a {shorten(annotation)}, to transform it or to write it into the graph",
            f"Write `{self.name}: hopkit.Subgraph` for what the op calls, `{self.name}: torch.Tensor` (or a tuple, "
            f"list, dict or registered pytree) for an operand, and `{self.name}: float` (or int, str, dtype, an Enum, "
            "a tuple of these) for an option",
        )

    def _resolve(self, text: str) -> object:
        try:
            return eval(text, {}, self.scope)  # the author's own code, as Python itself would evaluate it
        except Exception as error:
            raise self._unresolved(text, error) from error

    def _hints(self, cls: type) -> dict[str, object]:
        try:
            with contextlib.suppress(NameError):
                return typing_extensions.get_type_hints(cls)
            # A local class: its names are those of the body, and itself.
            return typing_extensions.get_type_hints(cls, localns={**self.scope, cls.__name__: cls})
        except Exception as error:
            raise self._unresolved(cls.__qualname__, error) from error

    def _unresolved(self, text: str, error: Exception) -> SpecError:
        if isinstance(error, NameError) and error.name:
            todo = f"Import or define {error.name} before the op, and not only under `if TYPE_CHECKING:`"
        else:
            todo = f"Write an annotation that Python can evaluate, such as `{self.name}: torch.Tensor`"
        return self._error(
            f"is annotated '{text}', which does not resolve ({error})",
            "annotations are read when the op is defined",
            todo,
        )

    def _error(self, found: str, why: str, todo: str) -> SpecError:
        return SpecError(f"parameter '{self.name}' of {self.who}", found, why=why, todo=todo)


def _is_anything(annotation: object) -> bool:
    return any(annotation is anything for anything in _ANYTHING)


def _is_option(verdict: _Verdict) -> TypeGuard[_Sort]:
    return isinstance(verdict, _Sort) and verdict.kind is Kind.OPTION


def _accepted(verdicts: Sequence[_Verdict]) -> tuple[object, ...]:
    return tuple(verdict.accepts for verdict in verdicts if isinstance(verdict, _Sort))


def _subgraphs(verdicts: Sequence[_Verdict], kind: Kind) -> _Sort | None:
    """One verdict for what holds, or may be, nothing but single subgraphs."""
    sorts = [v for v in verdicts if isinstance(v, _Sort) and v.kind is Kind.SUBGRAPH]
    return _Sort(kind, all(sort.graph_only for sort in sorts)) if len(sorts) == len(verdicts) else None


def _substitute(hint: object, parameters: Iterable[object], args: Iterable[object]) -> object:
    """A part of a generic, with the arguments that the generic was subscripted with."""
    given = dict(zip(parameters, args, strict=False))
    if isinstance(hint, TypeVar):
        return given.get(hint, hint)
    free = getattr(hint, "__parameters__", ())
    if not given or not free or isinstance(hint, type):
        return hint
    return cast("Mapping[object, object]", hint)[tuple(given.get(p, p) for p in free)]


def _field_names(cls: type) -> tuple[str, ...] | None:
    """The fields of a dataclass, a named tuple or a typed dict; None for any other class."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return cast("tuple[str, ...]", cls._fields)
    return tuple(cls.__annotations__) if typing_extensions.is_typeddict(cls) else None


def _is_frozen(cls: type) -> bool:
    params = getattr(cls, "__dataclass_params__", None)
    return params is not None and params.frozen
