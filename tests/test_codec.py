"""The codec: constants and containers survive as text; what cannot is an error that says so."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopkit import codec
from hopkit.codec import Slot
from hopkit.errors import LayoutError


class Color(enum.Enum):
    RED = "red"
    GREEN = 2


class Point(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: object
    steps: object = 3


def loads(text: str) -> object:
    return codec.loads(text, lambda value: value)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.binary(max_size=8),
    st.sampled_from(Color),
    st.sampled_from([torch.float32, torch.int8, torch.strided, torch.channels_last, torch.device("cuda", 1)]),
    st.builds(Slot, st.integers(0, 100)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(), st.tuples(st.integers())), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=2).map(OrderedDict),
        st.builds(Point, inner, inner),
        st.builds(Settings, inner, inner),
    ),
    max_leaves=12,
)


@given(VALUES)
def test_a_value_survives_as_text(value: object) -> None:
    again = loads(codec.dumps(value))
    assert again == value
    assert type(again) is type(value)


@given(st.floats())
def test_a_float_survives_to_the_last_bit(value: float) -> None:
    again = loads(codec.dumps(value))
    assert isinstance(again, float)
    assert again.hex() == value.hex() or (math.isnan(again) and math.isnan(value))


@given(VALUES)
def test_the_text_is_json(value: object) -> None:
    json.loads(codec.dumps(value))


@given(st.text())
def test_no_text_is_read_as_something_that_was_not_written(text: str) -> None:
    try:
        value = loads(text)
    except LayoutError:
        return
    assert repr(loads(codec.dumps(value))) == repr(value)


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.ones(2), len], ids=["object", "set", "tensor", "function"])
def test_what_no_text_stands_for_is_an_error(value: object) -> None:
    with pytest.raises(LayoutError, match="cannot be written into a graph"):
        codec.dumps((1, value))


def test_a_class_that_is_local_to_a_function_is_an_error() -> None:
    class Local(enum.Enum):
        ONE = 1

    with pytest.raises(LayoutError, match="Define it at the top of a module"):
        codec.dumps(Local.ONE)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2",
        '["unheard"]',
        '["float", "x"]',
        '["enum", "no.such.module:Color", "RED"]',
        '["dataclass", "os:system", {}]',
        '["namedtuple", "builtins:exec", "1"]',
        '["$"]',
        '["enum"]',
        "[]",
        '[["tuple"]]',
    ],
)
def test_damaged_text_is_an_error(text: str) -> None:
    with pytest.raises(LayoutError, match="cannot be read"):
        loads(text)


@pytest.mark.parametrize(
    ("expression", "size"),
    [
        ("7", 7),
        ("s0", 5),
        ("s0 - 1", 4),
        ("2*s0 + s1", 13),
        ("s0//2", 2),
        ("-s1 + 10", 7),
        ("Max(s0, s1)", 5),
        ("Mod(s0, 3)", 2),
        ("s0**2", 25),
        ("u9 + 1", None),
        ("__import__('os')", None),
        ("s0.real", None),
        ("?", None),
    ],
)
def test_sizes_are_worked_out_and_nothing_else_is_run(expression: str, size: int | None) -> None:
    assert codec.evaluate(expression, {"s0": 5, "s1": 3}) == size
