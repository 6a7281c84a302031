"""From a call's ``(args, kwargs)`` to one fitting value for every parameter. torch is known by name, not imported."""

from __future__ import annotations

import inspect
import numbers
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

from hopkit.constants import PLAIN, TENSOR, allows, is_constant, plain, qualified_names, ready, ready_items
from hopkit.errors import CallError
from hopkit.spec import Kind, OpSpec, Parameter

GRAPH_MODULE = "torch.fx.graph_module.GraphModule"


def bind(spec: OpSpec, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """The value of every parameter, defaults included, in order. That of ``*name`` and of subgraphs is a tuple; that of
    an option, or of a lone number, is `plain`.

    Raises:
        CallError: The arguments do not bind, or one of them is not what its parameter is for.
    """
    return checked(spec, by_name(spec, args, kwargs))


def by_name(spec: OpSpec, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """What a call gives for every parameter, defaults included, in order; whatever it is.

    Raises:
        CallError: The arguments do not bind.
    """
    try:
        return _binder(spec)(*args, **kwargs)
    except TypeError as error:
        raise CallError(
            f"{spec.name}()",
            str(error).removeprefix("op() "),
            why="arguments bind to an op as to its body",
            todo=f"Call it as `{spec.name}{spec.shown()}`",
        ) from None


def checked(spec: OpSpec, values: dict[str, object]) -> dict[str, object]:
    """``values``, as the parameters are for them.

    Raises:
        CallError: One of them is not what its parameter is for.
    """
    for p in spec.parameters:
        if p.kind is Kind.OPTION or isinstance(values[p.name], numbers.Number):
            values[p.name] = plain(values[p.name])
        if bad := misfit(p, values[p.name]):
            raise CallError(f"{spec.name}() argument '{p.name}'", bad.found, why=bad.why, todo=bad.todo)
        if p.kind is Kind.SUBGRAPHS:
            values[p.name] = tuple(cast("Sequence[object]", values[p.name]))
    return values


class Check(NamedTuple):
    """What an eager call has to refuse because the body might not.

    Args:
        position: Of the parameter; -1 where it is passed by keyword only.
        name: Of the parameter.
        variadic: Whether its value is everything from ``position`` on.
        types: Their values fit without further ado.
        fits: Whether a value of another type fits.
    """

    position: int
    name: str
    variadic: bool
    types: frozenset[type]
    fits: Callable[[object], bool]


def checks(spec: OpSpec) -> tuple[Check, ...]:
    """What `passes` has to check in a call of ``spec``; to be made once per op."""
    found: list[Check] = []
    for i, p in enumerate(spec.parameters):
        position = -1 if p.passing is inspect.Parameter.KEYWORD_ONLY else i
        if p.kind is not Kind.OPERAND:
            found.append(Check(position, p.name, p.variadic, *_test(p)))
    return tuple(found)


def _test(p: Parameter) -> tuple[frozenset[type], Callable[[object], bool]]:
    """The last two fields of a `Check`."""
    if p.kind is Kind.OPTION:
        items = ready_items(p.accepts)

        def constant(value: object) -> bool:
            if items and type(value) is tuple and items.issuperset(map(type, value)):
                return True
            return plain(value) is value and misfit(p, value) is None

        return ready(p.accepts), constant
    one = _is_graph_module if p.graph_only else callable

    def many(value: object) -> bool:
        return (type(value) is tuple and all(map(one, value))) or misfit(p, value) is None

    return frozenset(), one if p.kind is Kind.SUBGRAPH else many


def passes(checks: tuple[Check, ...], args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether a call passes its checks. If not, `bind` says why; what is missing or too much, the body says."""
    given = len(args)
    for position, name, variadic, types, fits in checks:
        if 0 <= position < given:
            value = args[position:] if variadic else args[position]
        elif name in kwargs:
            value = kwargs[name]
        else:
            continue
        if type(value) not in types and not fits(value):
            return False
    return True


class Misfit(NamedTuple):
    """Why a value does not fit a parameter: three of the four parts of an error."""

    found: str
    why: str
    todo: str


def misfit(parameter: Parameter, value: object) -> Misfit | None:
    """Why ``value`` is not what ``parameter`` is for; None where it fits."""
    if parameter.kind is Kind.OPERAND:
        return _no_operand(parameter, value)
    if parameter.kind is Kind.OPTION:
        if not is_constant(value):
            return _no_constant(parameter, value)
        return None if allows(parameter.accepts, value) else _other_constant(parameter, value)
    if parameter.kind is Kind.SUBGRAPH:
        return _no_subgraph(parameter, value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return next((bad for item in value if (bad := _no_subgraph(parameter, item))), None)
    return Misfit(
        f"expected a tuple of callables, got {_type(value)}",
        "the op calls each of them",
        f"Pass a tuple: `tuple({parameter.name})`, or `({parameter.name},)` for a single one",
    )


def _is_graph_module(value: object) -> bool:
    return GRAPH_MODULE in qualified_names(type(value))


def _type(value: object) -> str:
    return type(value).__qualname__


def _types(value: object) -> str:
    return f"({', '.join(map(_type, value))})" if isinstance(value, tuple) else _type(value)


def _no_operand(parameter: Parameter, value: object) -> Misfit | None:
    """What no tensor and no number is, where the annotation says nothing but those; other operands are any pytree."""
    said = {part for part in re.split(r"[ |,\[\]]+", parameter.annotation.replace("Optional", "None")) if part}
    if not said <= _LONE:
        return None
    values = value if parameter.variadic and isinstance(value, tuple) else (value,)
    numbers_only = said <= {"int", "SymInt", "bool"}
    for item in values:
        wrong = isinstance(item, (str, bytes, list, tuple, dict, set)) or "numpy.ndarray" in qualified_names(type(item))
        if wrong or (item is None and "None" not in said) or (numbers_only and type(item) is float):
            return Misfit(
                f"expected {parameter.annotation}, got {_type(item)}",
                "what an op computes with are tensors and numbers",
                f"Convert it, such as by `torch.as_tensor({parameter.name})`, or annotate a pytree",
            )
    return None


_LONE = {"Tensor", "None", "Union", "int", "float", "bool", "complex", "SymInt", "SymFloat", "SymBool"}
"""The words of an annotation of a tensor, or of a number that modes transform."""


def _no_subgraph(parameter: Parameter, value: object) -> Misfit | None:
    if parameter.graph_only and not _is_graph_module(value):
        return Misfit(
            f"expected a torch.fx.GraphModule, got {_type(value)}",
            "the op reads the graph itself, and another callable has none to show",
            "Trace it first: `torch.fx.symbolic_trace(f)`",
        )
    if not callable(value):
        return Misfit(
            f"expected a callable, got {_type(value)}",
            "the op calls it",
            "Pass a function or a module, such as `torch.sin`",
        )
    return None


def _no_constant(parameter: Parameter, value: object) -> Misfit:
    items = value if isinstance(value, tuple) else (value,)
    if any(TENSOR in qualified_names(type(item)) for item in items):
        todo = f"Pass a number, such as `tensor.item()`, or make it an operand: `{parameter.name}: torch.Tensor`"
    else:
        todo = "Pass something hashable: a tuple in place of a list, a frozen dataclass in place of a dict"
    return Misfit(
        f"expected a constant ({parameter.annotation}), got {_types(value)}",
        "an option is written into the graph, and graphs are looked up by it",
        todo,
    )


def _other_constant(parameter: Parameter, value: object) -> Misfit:
    got = f"{_type(value)} {value!r}" if type(value) in PLAIN and value is not None else _types(value)
    return Misfit(
        f"expected {parameter.annotation}, got {got}",
        "the body is written for what the annotation says",
        f"Convert it, or let the annotation say what the body takes: `{parameter.name}: {parameter.annotation} | ...`",
    )


_binders: dict[int, Callable[..., dict[str, object]]] = {}


def _binder(spec: OpSpec) -> Callable[..., dict[str, object]]:
    # By identity, as a default need not be hashable; weakly, as a body's closure may hold large tensors.
    binder = _binders.get(id(spec))
    if binder is None:
        binder = _binders[id(spec)] = _compile(spec.parameters)
        weakref.finalize(spec, _binders.pop, id(spec), None)
    return binder


def _compile(parameters: Sequence[Parameter]) -> Callable[..., dict[str, object]]:
    """A function of these parameters that returns them: it binds, and complains, just as Python does."""
    empty = inspect.Parameter.empty
    written = [
        inspect.Parameter(p.name, p.passing, default=empty if p.default is empty else _Code(f"defaults[{p.name!r}]"))
        for p in parameters
    ]
    values = ", ".join(f"{p.name!r}: {p.name}" for p in parameters)
    scope: dict[str, object] = {"defaults": {p.name: p.default for p in parameters}}
    exec(f"def op{inspect.Signature(written)}: return {{{values}}}", scope)
    return cast("Callable[..., dict[str, object]]", scope["op"])


class _Code(str):
    """Text whose repr is itself: a signature writes defaults by their repr."""

    __slots__ = ()
    __repr__ = str.__str__
