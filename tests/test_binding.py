"""A call binds to an op as it binds to a Python function, and each value is what its parameter is for."""

from __future__ import annotations

import dataclasses
import enum
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Literal

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hopkit import binding
from hopkit.binding import bind, checks, passes
from hopkit.errors import CallError
from hopkit.parameters import parse
from hopkit.spec import Kind, OpSpec, Parameter, Subgraph

X = torch.ones(2)
GRAPH = torch.fx.symbolic_trace(lambda x: x + 1)


class Color(enum.Enum):
    RED = "red"


def twice(body: Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * body(body(x))


def fold(body: Subgraph, /, x: Tensor, steps: int = 1, *rest: Tensor) -> Tensor:
    return body(x, steps, *rest)


def chain(x: Tensor, fs: tuple[Subgraph, ...]) -> Tensor:
    return x


def chain_of(*fs: Subgraph, x: Tensor) -> Tensor:
    return x


def pack(body: Subgraph, *sizes: int, dtype: torch.dtype = torch.float32) -> None: ...


def rewrite(graph: torch.fx.GraphModule, x: Tensor, also: tuple[torch.fx.GraphModule, ...] = ()) -> None: ...


BODIES: list[Callable[..., object]] = [twice, fold, chain, chain_of, pack, rewrite]


def spec(body: Callable[..., object]) -> OpSpec:
    return OpSpec(f"demo_{body.__name__}", body, parse(body))


def taking(annotation: object) -> OpSpec:
    """An op with an option ``o`` that is annotated so."""

    def body(f: Subgraph, o: object) -> None: ...

    body.__annotations__["o"] = annotation
    return OpSpec("demo_taking", body, parse(body))


TWICE, FOLD, CHAIN, CHAIN_OF, PACK, REWRITE = (spec(body) for body in BODIES)


def refusal(op: OpSpec, *args: object, **kwargs: object) -> CallError:
    with pytest.raises(CallError) as caught:
        bind(op, args, kwargs)
    return caught.value


# As Python binds


def test_a_call_gives_every_parameter_its_value_in_order() -> None:
    values = bind(TWICE, (torch.sin,), {"scale": 2.0, "x": X})
    assert list(values.items()) == [("body", torch.sin), ("x", X), ("scale", 2.0)]


def test_a_default_stands_for_what_is_not_passed() -> None:
    assert bind(TWICE, (torch.sin, X), {})["scale"] == 1.0


def test_the_rest_is_a_tuple() -> None:
    assert bind(FOLD, (torch.sin, X, 3, X, X), {})["rest"] == (X, X)


def test_no_rest_is_an_empty_tuple() -> None:
    assert bind(FOLD, (torch.sin, X), {})["rest"] == ()


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        ((torch.sin,), {}, "missing 1 required positional argument: 'x'"),
        ((), {}, "missing 2 required positional arguments: 'body' and 'x'"),
        ((torch.sin, X, 2.0), {}, "takes 2 positional arguments but 3 were given"),
        ((torch.sin, X), {"x": X}, "got multiple values for argument 'x'"),
        ((torch.sin, X), {"speed": 1}, "got an unexpected keyword argument 'speed'"),
    ],
    ids=["one missing", "two missing", "too many", "twice", "unexpected"],
)
def test_a_call_that_does_not_bind_is_refused_in_pythons_words(args: Any, kwargs: Any, found: str) -> None:
    error = refusal(TWICE, *args, **kwargs)
    assert error.who == "demo_twice()"
    assert error.found == found


def test_a_refusal_shows_the_signature() -> None:
    assert "Call it as `demo_twice(body: Subgraph, x: Tensor, *, scale: float = 1.0)`" in str(refusal(TWICE))


def test_a_refusal_is_a_type_error() -> None:
    assert isinstance(refusal(TWICE), TypeError)


def test_a_default_may_be_unhashable() -> None:
    def body(f: Subgraph, x: tuple[dict[str, Tensor], ...] = ({"x": X},)) -> None: ...

    assert bind(spec(body), (torch.sin,), {})["x"] == ({"x": X},)


def test_a_parameter_may_have_the_name_of_anything_in_the_binder() -> None:
    def body(op: Subgraph, defaults: int = 1, body: int = 2) -> None: ...

    assert bind(spec(body), (torch.sin,), {}) == {"op": torch.sin, "defaults": 1, "body": 2}


def test_an_op_that_is_gone_leaves_nothing_behind() -> None:
    op = dataclasses.replace(TWICE)
    bind(op, (torch.sin, X), {})
    key, gone = id(op), weakref.ref(op)
    assert key in binding._binders
    del op
    gc.collect()
    assert gone() is None
    assert key not in binding._binders


# What is a subgraph


def test_a_subgraph_must_be_callable() -> None:
    error = refusal(TWICE, X, X)
    assert error.who == "demo_twice() argument 'body'"
    assert error.found == "expected a callable, got Tensor"


def test_a_list_of_subgraphs_becomes_a_tuple() -> None:
    assert bind(CHAIN, (X, [torch.sin, torch.cos]), {})["fs"] == (torch.sin, torch.cos)


def test_there_may_be_no_subgraph_in_a_tuple() -> None:
    assert bind(CHAIN, (X, ()), {})["fs"] == ()


def test_every_subgraph_of_a_tuple_must_be_callable() -> None:
    assert refusal(CHAIN, X, (torch.sin, 3)).found == "expected a callable, got int"


def test_every_variadic_subgraph_must_be_callable() -> None:
    assert refusal(CHAIN_OF, torch.sin, None, x=X).found == "expected a callable, got NoneType"


@pytest.mark.parametrize(
    "value", [torch.sin, torch.nn.ModuleList(), "sin", None], ids=["function", "modules", "str", "None"]
)
def test_a_tuple_of_subgraphs_must_be_one(value: object) -> None:
    assert refusal(CHAIN, X, value).found == f"expected a tuple of callables, got {type(value).__qualname__}"


def test_a_graph_module_is_a_graph_module() -> None:
    assert bind(REWRITE, (GRAPH, X), {"also": (GRAPH,)}) == {"graph": GRAPH, "x": X, "also": (GRAPH,)}


def test_a_function_is_no_graph_module() -> None:
    error = refusal(REWRITE, twice, X)
    assert error.who == "demo_rewrite() argument 'graph'"
    assert error.found == "expected a torch.fx.GraphModule, got function"
    assert "`torch.fx.symbolic_trace(f)`" in error.todo


def test_a_tuple_of_functions_is_no_tuple_of_graph_modules() -> None:
    assert "expected a torch.fx.GraphModule, got function" in refusal(REWRITE, GRAPH, X, (GRAPH, twice)).found


# What is an option


def sym_int() -> torch.SymInt:
    return ShapeEnv().create_unbacked_symint()


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (float, 2.0),
        (float, 2),
        (int, True),
        (int | None, None),
        (str, "a"),
        (complex, 1j),
        (torch.dtype, torch.float32),
        (Color, Color.RED),
        (Literal["a", "b"], "b"),
        (tuple[int, tuple[int, Color]], (1, (2, Color.RED))),
    ],
    ids=str,
)
def test_an_option_is_what_its_annotation_says(annotation: object, value: object) -> None:
    op = taking(annotation)
    assert bind(op, (torch.sin, value), {})["o"] is value
    assert accepts(op, torch.sin, value)


@pytest.mark.parametrize(
    ("annotation", "value", "found"),
    [
        (int, "ab", "expected int, got str 'ab'"),
        (int, 1.5, "expected int, got float 1.5"),
        (float, None, "expected float, got NoneType"),
        (float, torch.sin, "expected float, got builtin_function_or_method"),
        (Color, "red", "expected Color, got str 'red'"),
        (Literal["a", "b"], "c", "expected Literal['a', 'b'], got str 'c'"),
        (tuple[int, ...], 1, "expected tuple[int, ...], got int 1"),
        (tuple[int, ...], (1, "a"), "expected tuple[int, ...], got (int, str)"),
        (torch.device, "cpu", "expected device, got str 'cpu'"),
    ],
    ids=str,
)
def test_an_option_is_nothing_else(annotation: object, value: object, found: str) -> None:
    op = taking(annotation)
    error = refusal(op, torch.sin, value)
    assert error.who == "demo_taking() argument 'o'"
    assert error.found == found
    assert not accepts(op, torch.sin, value)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (float, numpy.float64(2), 2.0),
        (int, numpy.int32(2), 2),
        (tuple[int, ...], torch.Size([2, 3]), (2, 3)),
        (Tensor | float, numpy.float32(0.5), 0.5),
    ],
    ids=str,
)
def test_what_is_nearly_a_number_or_a_tuple_becomes_one(annotation: object, value: object, expected: object) -> None:
    found = bind(taking(annotation), (torch.sin, value), {})["o"]
    assert repr(found) == repr(expected)


def test_an_option_that_is_nearly_plain_takes_the_long_way() -> None:
    assert not accepts(taking(float), torch.sin, numpy.float64(2))
    assert not accepts(taking(tuple[int, ...]), torch.sin, torch.Size([2, 3]))


def test_a_symbolic_size_is_an_option() -> None:
    size = sym_int()
    assert bind(TWICE, (torch.sin, X), {"scale": size})["scale"] is size


def test_a_tensor_is_no_option() -> None:
    error = refusal(TWICE, torch.sin, X, scale=X)
    assert error.who == "demo_twice() argument 'scale'"
    assert error.found == "expected a constant (float), got Tensor"
    assert "make it an operand: `scale: torch.Tensor`" in error.todo


def test_a_tensor_in_a_tuple_is_no_option() -> None:
    assert refusal(TWICE, torch.sin, X, scale=(1, X)).found.endswith("got (int, Tensor)")


def test_a_parameter_of_a_module_is_no_option() -> None:
    assert refusal(TWICE, torch.sin, X, scale=torch.nn.Parameter(X)).found.endswith("got Parameter")


def test_a_list_is_no_option() -> None:
    error = refusal(TWICE, torch.sin, X, scale=[1.0])
    assert error.who == "demo_twice() argument 'scale'"
    assert error.found == "expected a constant (float), got list"
    assert "a tuple in place of a list" in error.todo


def test_every_variadic_option_is_looked_at() -> None:
    assert refusal(PACK, torch.sin, 1, X).found == "expected a constant (int), got (int, Tensor)"
    assert refusal(PACK, torch.sin, 1, "a").found == "expected int, got (int, str)"


# The checks of an eager call


def accepts(op: OpSpec, *args: object, **kwargs: object) -> bool:
    return passes(checks(op), args, kwargs)


def test_everything_but_operands_is_checked() -> None:
    assert [check.name for op in (TWICE, FOLD, CHAIN) for check in checks(op)] == [
        *("body", "scale"),
        *("body", "steps"),
        "fs",
    ]


def test_a_keyword_is_checked() -> None:
    assert accepts(TWICE, torch.sin, X, scale=2.0)
    assert not accepts(TWICE, torch.sin, X, scale=X)


def test_a_positional_argument_is_checked() -> None:
    assert accepts(FOLD, torch.sin, X, 2)
    assert not accepts(FOLD, torch.sin, X, X)


def test_a_positional_parameter_is_checked_where_it_comes_by_keyword() -> None:
    assert accepts(FOLD, torch.sin, X, steps=2)
    assert not accepts(FOLD, torch.sin, X, steps=X)


def test_every_variadic_option_is_checked() -> None:
    assert accepts(PACK, torch.sin, 1, 2, dtype=torch.float64)
    assert not accepts(PACK, torch.sin, 1, X)


def test_a_subgraph_is_checked_before_the_body_might_pass_it_over() -> None:
    assert accepts(TWICE, torch.sin, X)
    assert not accepts(TWICE, "sin", X)


def test_every_subgraph_of_a_tuple_is_checked() -> None:
    assert accepts(CHAIN, X, (torch.sin, torch.cos))
    assert accepts(CHAIN, X, [torch.sin])
    assert not accepts(CHAIN, X, (torch.sin, 3))
    assert not accepts(CHAIN, X, torch.sin)
    assert not accepts(CHAIN_OF, torch.sin, None, x=X)


def test_a_graph_module_is_checked() -> None:
    assert accepts(REWRITE, GRAPH, X, (GRAPH,))
    assert not accepts(REWRITE, twice, X)
    assert not accepts(REWRITE, None, X)
    assert not accepts(REWRITE, GRAPH, X, also=(twice,))


def test_a_default_is_not_checked_again() -> None:
    assert accepts(TWICE, torch.sin, X)


def test_a_symbolic_size_passes() -> None:
    assert accepts(FOLD, torch.sin, X, sym_int())


# In general

P = inspect.Parameter
NAMES = list("abcdef")
FUNCTIONS: list[Callable[..., object]] = [
    lambda a, b=1: {"a": a, "b": b},
    lambda a, /, b, *, c=3: {"a": a, "b": b, "c": c},
    lambda a=1, *b, c, d=4: {"a": a, "b": b, "c": c, "d": d},
    lambda *a, b=2: {"a": a, "b": b},
    lambda a, b=2, /, c=3, *d, e=5, f: {"a": a, "b": b, "c": c, "d": d, "e": e, "f": f},
]

calls = st.tuples(
    st.lists(st.integers(), max_size=5).map(tuple), st.dictionaries(st.sampled_from(NAMES), st.integers())
)


def operands(signature: inspect.Signature) -> tuple[Parameter, ...]:
    return tuple(Parameter(p.name, Kind.OPERAND, "Tensor", p.kind, p.default) for p in signature.parameters.values())


@st.composite
def signatures(draw: st.DrawFn) -> inspect.Signature:
    """Any signature that Python allows, but for ``**kwargs``."""
    some = st.lists(st.sampled_from([P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD, P.KEYWORD_ONLY]), max_size=5)
    rest: list[inspect._ParameterKind] = draw(st.sampled_from([[], [P.VAR_POSITIONAL]]))
    kinds = sorted([*draw(some), *rest])
    parameters: list[inspect.Parameter] = []
    optional = False  # once one positional parameter has a default, those after it have one too
    for name, kind in zip(NAMES, kinds, strict=False):
        positional = kind in (P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD)
        given_one = kind is not P.VAR_POSITIONAL and ((positional and optional) or draw(st.booleans()))
        optional = optional or (positional and given_one)
        parameters.append(P(name, kind, default=draw(st.integers()) if given_one else P.empty))
    return inspect.Signature(parameters)


def outcome(call: Callable[[], object]) -> object:
    """What the call returns, or what it says is wrong, without the name of what was called."""
    try:
        return call()
    except CallError as error:
        return error.found
    except TypeError as error:
        return str(error).partition("() ")[2]


@given(signatures(), calls)
def test_binding_agrees_with_inspect(
    signature: inspect.Signature, call: tuple[tuple[int, ...], dict[str, int]]
) -> None:
    def expected() -> list[tuple[str, object]]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return list(bound.arguments.items())

    args, kwargs = call
    op = OpSpec("demo_any", print, operands(signature))
    found = outcome(lambda: list(bind(op, args, kwargs).items()))
    # inspect words its errors in a way of its own
    assert found == outcome(expected) or (isinstance(found, str) and isinstance(outcome(expected), str))


@given(st.sampled_from(FUNCTIONS), calls)
def test_binding_agrees_with_calling(body: Callable[..., object], call: tuple[tuple[int, ...], dict[str, int]]) -> None:
    args, kwargs = call
    op = OpSpec("demo_any", body, operands(inspect.signature(body)))
    assert outcome(lambda: bind(op, args, kwargs)) == outcome(lambda: body(*args, **kwargs))


@given(st.data(), signatures())
def test_a_value_for_every_parameter_binds_to_itself(data: st.DataObject, signature: inspect.Signature) -> None:
    op = OpSpec("demo_any", print, operands(signature))
    values: dict[str, object] = {
        p.name: data.draw(st.lists(st.integers()).map(tuple) if p.variadic else st.integers()) for p in op.parameters
    }
    args, kwargs = op.arguments(values)
    assert bind(op, args, kwargs) == values


anything: st.SearchStrategy[object] = st.sampled_from(
    [1, 2.0, "a", None, (1, 2), [1], {}, X, (X,), torch.float32, Color.RED, Color, twice, numpy.int64(1)]
)


@given(anything, st.lists(anything, max_size=2), st.booleans())
def test_an_eager_call_passes_where_the_call_binds_to_what_it_gives(
    steps: object, sizes: list[object], by_keyword: bool
) -> None:
    def body(f: Subgraph, steps: int, *sizes: int, dtype: torch.dtype = torch.float32) -> None: ...

    op = spec(body)
    args, kwargs = ((torch.sin, steps, *sizes), {}) if not by_keyword else ((torch.sin, 1, *sizes), {"dtype": steps})
    given = inspect.signature(body).bind(*args, **kwargs)
    given.apply_defaults()
    bound = outcome(lambda: bind(op, args, kwargs))
    same = isinstance(bound, dict) and repr(bound) == repr(given.arguments)
    assert passes(checks(op), args, kwargs) == same
