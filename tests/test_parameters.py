"""What an annotation says that a parameter is, and what is said where it says nothing."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import inspect
import subprocess
import sys
import typing
from collections import OrderedDict, namedtuple
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Optional, TypedDict, TypeVar, Union

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typing_extensions import TypeAliasType

from hopkit.errors import SpecError
from hopkit.parameters import parse, shorten
from hopkit.spec import Kind, Parameter, Subgraph

T = TypeVar("T")
BoundT = TypeVar("BoundT", bound=Tensor)
ChoiceT = TypeVar("ChoiceT", int, str)
Size = NewType("Size", int)


class Color(enum.Enum):
    RED = "red"


class State(NamedTuple):
    carry: Tensor
    steps: int


class Window(NamedTuple):
    size: int
    stride: int


Loose = namedtuple("Loose", ["first", "second"])


@dataclasses.dataclass
class Batch:
    data: Tensor
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Setup:
    depth: int
    mode: Literal["fast", "exact"] = "fast"


@dataclasses.dataclass
class Loosened:
    depth: int


@dataclasses.dataclass(frozen=True)
class Box(Generic[T]):
    content: T
    contents: tuple[T, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chain:
    length: int
    rest: Chain | None = None


@dataclasses.dataclass
class Tree:
    leaf: Tensor
    children: list[Tree]


class Record(TypedDict):
    value: Tensor


class Opaque:
    pass


class Step(Subgraph[Tensor], typing.Protocol):
    pass


Nested = TypeAliasType("Nested", "Tensor | tuple[Nested, ...]")
Sizes = TypeAliasType("Sizes", "int | tuple[Sizes, ...]")
Pair = TypeAliasType("Pair", tuple[T, T], type_params=(T,))
Forest = dict[str, "Forest | Tensor"]


def one(annotation: object, **known: Any) -> Parameter:
    """The parameter ``x`` of a body, annotated so."""

    def body(f: Subgraph, x: object) -> None: ...

    body.__annotations__["x"] = annotation
    return parse(body, **known)[1]


def refusal(annotation: object) -> str:
    with pytest.raises(SpecError) as caught:
        one(annotation)
    return str(caught.value)


# Subgraphs


@pytest.mark.parametrize(
    "annotation",
    [
        Subgraph,
        Subgraph[Tensor],
        Subgraph[tuple[Tensor, Tensor]],
        Step,
        Callable,
        Callable[..., Tensor],
        Callable[[Tensor], Tensor],
        typing.Callable,
        typing.Callable[[Tensor], Tensor],
        Union[Subgraph, torch.fx.GraphModule],  # noqa: UP007
        Annotated[Subgraph, ["any", "metadata"]],
        "Subgraph[Tensor]",
    ],
    ids=str,
)
def test_a_callable_is_a_subgraph(annotation: object) -> None:
    parameter = one(annotation)
    assert parameter.kind is Kind.SUBGRAPH
    assert not parameter.graph_only


def test_a_graph_module_is_a_subgraph_that_nothing_else_can_stand_for() -> None:
    parameter = one(torch.fx.GraphModule)
    assert parameter.kind is Kind.SUBGRAPH
    assert parameter.graph_only


@pytest.mark.parametrize(
    "annotation",
    [
        tuple[Subgraph, ...],
        tuple[Subgraph, Subgraph[Tensor]],
        list[Subgraph],
        Sequence[Subgraph],
        typing.Sequence[Callable[[Tensor], Tensor]],
        typing.Tuple["Subgraph", ...],  # noqa: UP006
    ],
    ids=str,
)
def test_a_sequence_of_callables_is_subgraphs(annotation: object) -> None:
    parameter = one(annotation)
    assert parameter.kind is Kind.SUBGRAPHS
    assert not parameter.graph_only


def test_a_tuple_of_graph_modules_takes_nothing_else() -> None:
    assert one(tuple[torch.fx.GraphModule, ...]).graph_only


def test_variadic_subgraphs_are_a_tuple_of_them() -> None:
    def body(*fs: Subgraph) -> None: ...

    (fs,) = parse(body)
    assert fs.kind is Kind.SUBGRAPHS
    assert fs.variadic
    assert fs.annotation == "Subgraph"


# Operands


@pytest.mark.parametrize(
    "annotation",
    [
        Tensor,
        torch.nn.Parameter,
        torch.SymInt,
        torch.SymFloat,
        torch.SymBool,
        Tensor | None,
        Optional[Tensor],  # noqa: UP045
        Tensor | float,
        int | torch.SymInt,
        Union[int, torch.SymInt],  # noqa: UP007
        tuple[Tensor, ...],
        tuple[int, Tensor],
        tuple[Tensor, list[int]],
        list[Tensor],
        Sequence[Tensor],
        dict[str, Tensor],
        Mapping[str, tuple[Tensor, int]],
        OrderedDict[str, Tensor],
        typing.Dict[str, "Tensor"],  # noqa: UP006
        tuple,
        list,
        dict,
        typing.Tuple,  # noqa: UP006
        tuple[object, ...],
        dict[str, Any],
        State,
        Loose,
        Batch,
        Record,
        Box[Tensor],
        Box[tuple[Tensor, int]],
        Box,
        Annotated[Tensor, "contiguous"],
        T,
        T | None,
        BoundT,
        "tuple[BoundT, ...]",
        Pair[Tensor],
        "Tensor | None",
    ],
    ids=str,
)
def test_what_holds_tensors_is_an_operand(annotation: object) -> None:
    assert one(annotation).kind is Kind.OPERAND


@pytest.mark.parametrize("annotation", [Tree, Nested, Forest, "Forest"], ids=str)
def test_a_recursive_pytree_is_an_operand(annotation: object) -> None:
    assert one(annotation).kind is Kind.OPERAND


def test_a_class_that_torch_knows_as_a_pytree_is_an_operand() -> None:
    assert one(Opaque, is_pytree=lambda cls: cls is Opaque).kind is Kind.OPERAND


def test_variadic_tensors_are_an_operand() -> None:
    def body(f: Subgraph, *xs: Tensor) -> None: ...

    xs = parse(body)[1]
    assert xs.kind is Kind.OPERAND
    assert xs.variadic


# Options


@pytest.mark.parametrize(
    "annotation",
    [
        int,
        float,
        bool,
        str,
        complex,
        bytes,
        None,
        type(None),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        Color,
        Setup,
        Window,
        Chain,
        Box[int],
        Box[tuple[int, str]],
        Literal["a", 1],
        tuple[int, ...],
        tuple[tuple[int, str], ...],
        int | None,
        Optional[torch.dtype],  # noqa: UP045
        torch.types.Device,
        Size,
        ChoiceT,
        Pair[int],
        "int | None",
    ],
    ids=str,
)
def test_a_constant_is_an_option(annotation: object) -> None:
    assert one(annotation).kind is Kind.OPTION


def test_variadic_ints_are_an_option() -> None:
    def body(f: Subgraph, *sizes: int) -> None: ...

    sizes = parse(body)[1]
    assert sizes.kind is Kind.OPTION
    assert sizes.variadic


@pytest.mark.parametrize(
    ("annotation", "accepts"),
    [
        (None, type(None)),
        (Literal["a", 1], Literal["a", 1]),
        (int | None, int | None),
        ("int | None", int | None),
        (Size, int),
        (ChoiceT, int | str),
        (Annotated[float, "positive"], float),
        (tuple[Size, ...], tuple[int, ...]),
        (tuple["int", Pair[str]], tuple[int, tuple[str, str]]),
        (Setup, Setup),
        (Box[int], Box),
        (Chain | None, Chain | None),
        (Sizes, int | tuple[object, ...]),
        (torch.types.Device, torch.device | str | int | None),
    ],
    ids=str,
)
def test_what_an_option_may_be_is_written_out(annotation: object, accepts: object) -> None:
    assert one(annotation).accepts == accepts


# A whole parameter


def test_a_parameter_keeps_how_it_is_passed_and_its_default() -> None:
    def body(f: Subgraph, /, x: Tensor, *, scale: float = 1.0) -> None: ...

    assert parse(body) == (
        Parameter("f", Kind.SUBGRAPH, "Subgraph", inspect.Parameter.POSITIONAL_ONLY),
        Parameter("x", Kind.OPERAND, "Tensor"),
        Parameter("scale", Kind.OPTION, "float", inspect.Parameter.KEYWORD_ONLY, 1.0, accepts=float),
    )


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Tensor, "Tensor"),
        (torch.fx.GraphModule, "GraphModule"),
        (Subgraph[tuple[Tensor, Tensor]], "Subgraph[tuple[Tensor, Tensor]]"),
        (tuple[Tensor, ...], "tuple[Tensor, ...]"),
        (collections.abc.Callable[[Tensor], Tensor], "Callable[[Tensor], Tensor]"),
        (Tensor | None, "Tensor | None"),
        (typing.Tuple["Tensor", ...], "Tuple[Tensor, ...]"),  # noqa: UP006
        (Annotated[Tensor, "contiguous"], "Tensor"),
        (Literal["a.b", -1], "Literal['a.b', -1]"),
        (Any, "Any"),
        (T, "T"),
        ("torch.Tensor | None", "Tensor | None"),
        ("'Tensor'", "Tensor"),
        ("Literal['a.b']", "Literal['a.b']"),
        (float, "float"),
    ],
    ids=str,
)
def test_an_annotation_is_shown_as_its_author_would_write_it(annotation: object, text: str) -> None:
    assert shorten(annotation) == text


# Where names come from


def test_names_come_from_the_closure_of_the_body() -> None:
    class Local(NamedTuple):
        carry: Tensor

    def body(f: Subgraph, x: Local) -> Local:
        return Local(f(x.carry))

    assert parse(body)[1].kind is Kind.OPERAND


def test_names_come_from_the_caller() -> None:
    @dataclasses.dataclass(frozen=True)
    class Local:
        depth: int
        rest: Local | None = None

    def body(f: Subgraph, x: Local) -> None: ...

    assert parse(body, locals())[1].kind is Kind.OPTION


def test_the_closure_of_the_body_goes_before_the_caller() -> None:
    class Local(NamedTuple):
        carry: Tensor

    def body(f: Subgraph, x: Local) -> Local:
        return Local(f(x.carry))

    assert parse(body, {"Local": int})[1].kind is Kind.OPERAND


class Doubler:
    def __call__(self, f: Subgraph, x: Tensor) -> Tensor:
        return 2 * f(x)

    @classmethod
    def made(cls, f: Subgraph, x: Tensor) -> Tensor:
        return f(x)


@pytest.mark.parametrize(
    "body", [Doubler(), Doubler.made, functools.partial(Doubler())], ids=["object", "class", "partial"]
)
def test_a_body_is_whatever_has_a_signature(body: Callable[..., Tensor]) -> None:
    assert [p.name for p in parse(body)] == ["f", "x"]


def test_a_wrapped_body_is_read_in_the_scope_of_the_function_inside() -> None:
    @functools.wraps(Doubler.made)
    def body(*args: Any, **kwargs: Any) -> Tensor:
        return Doubler.made(*args, **kwargs)

    assert [p.kind for p in parse(body)] == [Kind.SUBGRAPH, Kind.OPERAND]


# Refusals


def test_no_annotation() -> None:
    with pytest.raises(
        SpecError, match=r"parameter 'f' of op body '.*<lambda>' has no annotation.*Write `f: torch\.Tensor`"
    ):
        parse(lambda f: f)


def test_an_unresolved_name_is_named() -> None:
    message = refusal("Missing | None")
    assert "is annotated 'Missing | None', which does not resolve (name 'Missing' is not defined)" in message
    assert "Import or define Missing" in message


def test_an_unresolved_name_inside_a_dataclass_is_named() -> None:
    Broken = dataclasses.make_dataclass("Broken", [("field", "Missing")])  # noqa: N806
    assert "Import or define Missing" in refusal(Broken)


def test_an_annotation_that_fails_is_shown() -> None:
    assert "is annotated '1 +', which does not resolve" in refusal("1 +")


@pytest.mark.parametrize(
    ("annotation", "remedy"),
    [
        (set[Tensor], "Write `x: tuple[Tensor, ...]`"),
        (list[int], "Write `x: tuple[int, ...]`"),
        (Sequence[str], "Write `x: tuple[str, ...]`"),
        (dict[str, int], "Write `x: tuple[tuple[str, int], ...]`"),
        (int | list[int], "Write `x: tuple[int, ...]`"),
        (Loosened, "Freeze Loosened: `@dataclasses.dataclass(frozen=True)`"),
        (Opaque, "Write `x: hopkit.Subgraph` for what the op calls"),
        (torch.nn.Module, "Write `x: hopkit.Subgraph` for what the op calls"),
        (type[int], "Write `x: hopkit.Subgraph` for what the op calls"),
        (3, "Write `x: hopkit.Subgraph` for what the op calls"),
    ],
    ids=str,
)
def test_an_unknown_kind_says_what_to_write(annotation: object, remedy: str) -> None:
    message = refusal(annotation)
    assert message.startswith("parameter 'x' of op body 'one.<locals>.body' is annotated '" + shorten(annotation))
    assert remedy in message


@pytest.mark.parametrize(
    "annotation",
    [
        Subgraph | None,
        Subgraph | Tensor,
        tuple[Subgraph, Tensor],
        dict[str, Subgraph],
        tuple[Tensor, dict[str, Subgraph]],
        tuple[tuple[Subgraph, ...], ...],
        Box[Subgraph],
    ],
    ids=str,
)
def test_a_subgraph_travels_alone(annotation: object) -> None:
    message = refusal(annotation)
    assert "is, or holds, a subgraph and something else" in message
    assert "`x: tuple[hopkit.Subgraph, ...]`" in message


@pytest.mark.parametrize("annotation", [object, Any, "object", Any | None, int | Any], ids=str)
def test_anything(annotation: object) -> None:
    message = refusal(annotation)
    assert "which is no subgraph, no operand and no option. Anything may stand there" in message
    assert "Write `x: torch.Tensor`, `x: tuple[object, ...]` (or list, dict) for any pytree" in message


def test_no_subgraph() -> None:
    def body(x: Tensor) -> None: ...

    with pytest.raises(SpecError, match=r"takes no subgraph.*torch\.library\.custom_op"):
        parse(body)


def test_any_keyword() -> None:
    def body(f: Subgraph, **settings: float) -> None: ...

    with pytest.raises(SpecError, match=r"parameter 'settings' of .* takes any keyword.*`\*, scale: float = 1\.0`"):
        parse(body)


@pytest.mark.parametrize("annotation", [object, Any, "object"], ids=str)
def test_variadic_anything(annotation: object) -> None:
    def body(f: Subgraph, *rest: object) -> None: ...

    body.__annotations__["rest"] = annotation
    with pytest.raises(SpecError, match=r"parameter 'rest' of .* is annotated.*`rest: tuple\[object, \.\.\.\]`"):
        parse(body)


def test_variadic_without_annotation() -> None:
    def body(f: Subgraph, *rest) -> None: ...  # type: ignore[no-untyped-def]

    with pytest.raises(SpecError, match=r"parameter 'rest' of .* has no annotation.*`\*rest: torch\.Tensor`"):
        parse(body)


@pytest.mark.parametrize(
    "default", [[1], {}, torch.ones(()), (torch.ones(()),)], ids=["list", "dict", "tensor", "tuple"]
)
def test_a_default_must_fit_its_option(default: object) -> None:
    def body(f: Subgraph, sizes: tuple[int, ...] = default) -> None: ...  # type: ignore[assignment]

    with pytest.raises(
        SpecError,
        match=r"parameter 'sizes' of .* has a default that does not fit: expected a constant \(tuple\[int, \.\.\.\]\)",
    ):
        parse(body)


def test_a_default_must_be_what_the_annotation_says() -> None:
    def body(f: Subgraph, n: int = "one") -> None: ...  # type: ignore[assignment]

    with pytest.raises(SpecError, match=r"'n' of .* has a default that does not fit: expected int, got str 'one'"):
        parse(body)


def test_a_default_must_fit_its_subgraph() -> None:
    def body(f: Subgraph = None) -> None: ...  # type: ignore[assignment]

    with pytest.raises(SpecError, match="has a default that does not fit: expected a callable, got NoneType"):
        parse(body)


class Asynchronous:
    async def __call__(self, f: Subgraph, x: Tensor) -> Tensor:
        return f(x)


async def asynchronous(f: Subgraph, x: Tensor) -> Tensor:
    return f(x)


def generating(f: Subgraph, x: Tensor) -> Iterator[Tensor]:
    yield f(x)


async def both(f: Subgraph, x: Tensor) -> AsyncIterator[Tensor]:
    yield f(x)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (asynchronous, "a coroutine (`async def`)"),
        (Asynchronous(), "a coroutine (`async def`)"),
        (functools.partial(asynchronous), "a coroutine (`async def`)"),
        (generating, "a generator (it yields)"),
        (both, "a generator (it yields)"),
    ],
)
def test_a_body_that_waits_to_be_driven(body: Callable[..., object], kind: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(body)
    assert caught.value.found == f"is {kind}"


def test_a_body_without_a_signature() -> None:
    with pytest.raises(SpecError, match="has no signature to read"):
        parse(min)


# In general

_LEAVES: dict[object, Kind] = {int: Kind.OPTION, str: Kind.OPTION, Tensor: Kind.OPERAND, torch.SymInt: Kind.OPERAND}


@st.composite
def written(draw: st.DrawFn, depth: int = 3) -> tuple[Any, Kind]:
    """An annotation of tuples and unions, and its kind: an operand where an operand is anywhere inside."""
    if depth == 0 or draw(st.booleans()):
        leaf = draw(st.sampled_from(list(_LEAVES)))
        return leaf, _LEAVES[leaf]
    parts, kinds = zip(*draw(st.lists(written(depth - 1), min_size=1, max_size=3)), strict=True)
    form: Any = draw(st.sampled_from([tuple, Union]))
    return form[parts], Kind.OPERAND if Kind.OPERAND in kinds else Kind.OPTION


@given(written())
def test_an_operand_anywhere_inside_makes_an_operand(case: tuple[object, Kind]) -> None:
    annotation, kind = case
    assert one(annotation).kind is kind


def test_reading_a_body_does_not_import_torch() -> None:
    # In a package without its __init__, which is free to import what it wants.
    script = """
import sys, types, importlib.util
package = types.ModuleType("hopkit")
package.__path__ = [sys.argv[1]]
sys.modules["hopkit"] = package
import hopkit.parameters, hopkit.binding
assert not {"torch", "pluggy"} & set(sys.modules)
"""
    folder = inspect.getfile(Parameter).rpartition("/")[0]
    subprocess.run([sys.executable, "-c", script, folder], check=True)
