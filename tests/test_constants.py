"""What an option may be: what Python's typing takes for its annotation, as a plain constant."""

from __future__ import annotations

import dataclasses
import enum
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hopkit.constants import allows, is_constant, plain, ready, ready_items


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Window(NamedTuple):
    size: object
    stride: object


@dataclasses.dataclass(frozen=True)
class Setup:
    depth: object


class Loud(str):
    __slots__ = ()


# What is plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (numpy.float64(2), 2.0),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(2), 2),
        (numpy.complex64(1j), 1j),
        (numpy.bool_(True), True),
        (numpy.str_("a"), "a"),
        (Fraction(1, 2), 0.5),
        (Loud("a"), "a"),
        (torch.Size([2, 3]), (2, 3)),
        ((1, (numpy.int8(2),)), (1, (2,))),
        (Window(numpy.int64(2), 1), Window(2, 1)),
    ],
    ids=repr,
)
def test_what_is_a_variety_of_a_constant_becomes_plain(value: object, expected: object) -> None:
    found = plain(value)
    assert repr(found) == repr(expected)
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "value",
    [1, 2.0, True, "a", None, (1, (2, "a")), Color.RED, Level.LOW, Window(1, 2), torch.float32, Setup(1), [1]],
    ids=repr,
)
def test_anything_else_stays_what_it_is(value: object) -> None:
    assert plain(value) is value


# What fits


def symbol(kind: type) -> object:
    size = ShapeEnv().create_unbacked_symint()
    return {int: size, float: size * 0.5, bool: size == 3}[kind]


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (int, Level.LOW),
        (float, 1),
        (complex, 1.0),
        (str, "a"),
        (int | None, None),
        (Literal["a", 1], "a"),
        (tuple[int, ...], ()),
        (tuple[int, ...], (1, 2)),
        (tuple[int, ...], Window(1, 2)),
        (tuple[int, str], (1, "a")),
        (tuple[tuple[int, ...], ...], ((1,), ())),
        (tuple[int | None, ...], (1, None)),
        (Color, Color.RED),
        (Window, Window(1, 2)),
        (Setup, Setup(1)),
        (torch.dtype, torch.float32),
        (object, Color.RED),
        (int, symbol(int)),
        (float, symbol(int)),
        (float, symbol(float)),
        (bool, symbol(bool)),
        (tuple[int, ...], (2, symbol(int))),
    ],
    ids=repr,
)
def test_what_typing_takes_is_allowed(hint: object, value: object) -> None:
    assert allows(hint, value)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, "ab"),
        (int, 1.0),
        (int, None),
        (bool, 1),
        (float, 1j),
        (str, 1),
        (int | None, "a"),
        (Literal["a", 1], "b"),
        (Literal["a", 1], True),
        (tuple[int, ...], 1),
        (tuple[int, ...], (1, "a")),
        (tuple[int, str], (1,)),
        (tuple[int, str], ("a", 1)),
        (Color, "RED"),
        (Window, (1, 2)),
        (torch.dtype, "float32"),
        (int, symbol(float)),
        (int, symbol(bool)),
    ],
    ids=repr,
)
def test_what_typing_refuses_is_not(hint: object, value: object) -> None:
    assert not allows(hint, value)


@pytest.mark.parametrize("value", [[1], {}, torch.ones(1), (1, [2]), Setup([1])], ids=repr)
def test_what_has_no_hash_is_no_constant(value: object) -> None:
    assert not is_constant(value)


# The short way

HINTS: list[object] = [
    int,
    float,
    complex,
    bool,
    str,
    int | None,
    float | str,
    Literal[1],
    tuple[int, ...],
    tuple[int, str],
    tuple[float | None, ...],
    Color,
    Window,
    Setup,
    torch.dtype,
    object,
]
VALUES: list[object] = [
    *(True, 1, 2.0, 1j, "a", None, b"", Color.RED, Level.LOW, Window(1, 2), Setup(1), Setup([]), torch.float32),
    *(numpy.float64(1), torch.Size([1]), torch.ones(1), [1], print, int),
]


@given(st.sampled_from(HINTS), st.sampled_from(VALUES))
def test_what_needs_no_closer_look_would_stand_it(hint: object, value: object) -> None:
    if type(value) in ready(hint):
        assert is_constant(value)
        assert plain(value) is value
        assert allows(hint, value)


@given(st.sampled_from(HINTS), st.lists(st.sampled_from(VALUES), max_size=3).map(tuple))
def test_nor_would_a_tuple_of_such_items(hint: object, value: tuple[object, ...]) -> None:
    if ready_items(hint) and ready_items(hint).issuperset(map(type, value)):
        assert is_constant(value)
        assert plain(value) is value
        assert allows(hint, value)


def test_everyday_options_need_no_closer_look() -> None:
    assert {int, bool} <= ready(int)
    assert {float, int, bool} <= ready(float)
    assert {float, type(None)} <= ready(float | None)
    assert torch.dtype in ready(torch.dtype)
    assert Color in ready(Color)
    assert int in ready_items(tuple[int, ...])
