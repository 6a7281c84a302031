"""Layouts: what the flat form of a call cannot say survives as text, and only what was recorded fits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopkit import layout
from hopkit._torch import trees
from hopkit.codec import Slot
from hopkit.errors import LayoutError, SignatureError
from hopkit.layout import Layout, Meta, Slots, Variant, fill
from tests.recording import define_twice, record

LEAVES = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.builds(lambda: torch.ones(2)))
PYTREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=8,
)
DIMS = st.one_of(st.integers(0, 9), st.sampled_from(["s0", "s0 + 1", "2*s1", "?"]))
SHAPES = st.lists(DIMS, max_size=3).map(tuple)
METAS = st.one_of(
    st.builds(
        Meta, st.sampled_from([torch.float32, torch.int64]), st.just("cpu"), st.lists(DIMS, max_size=3).map(tuple)
    ),
    st.builds(Meta, st.none(), st.just(""), st.tuples(DIMS)),
)
VARIANTS = st.builds(
    Variant,
    st.integers(0, 3),
    st.just(((Slot(0),), {"k": Slot(1), "n": 3})),
    st.lists(METAS, max_size=2).map(tuple),
    st.lists(st.integers(0, 5), max_size=2).map(tuple),
    st.just([Slot(0), None]),
)
LAYOUTS = st.builds(
    Layout,
    st.dictionaries(st.sampled_from(["x", "y"]), st.just({"a": Slot(0), "b": (1, 2.5)})),
    st.dictionaries(
        st.sampled_from(["f", "g"]), st.lists(st.lists(VARIANTS, max_size=2).map(tuple), max_size=2).map(tuple)
    ),
    st.lists(METAS, max_size=3).map(tuple),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 3),
    st.lists(st.just(("vjp", (0,), (1, 2))), max_size=2).map(tuple),
    st.sampled_from(["", "a70d-0123-4567"]),
)


@given(LAYOUTS)
def test_a_layout_survives_as_text(known: Layout) -> None:
    assert layout.loads(known.dumps()) == known


@given(PYTREES)
def test_what_is_split_is_filled_again(value: object) -> None:
    slots = Slots()
    shape = slots.split(value)
    assert not any(isinstance(leaf, torch.Tensor) for leaf in trees.leaves(shape))
    filled, tree = trees.flatten(fill(shape, slots.inputs))
    leaves, wanted = trees.flatten(value)
    assert tree == wanted
    assert (len(filled) == len(leaves) and all(a is b for a, b in zip(filled, leaves, strict=True))) or filled == leaves


def test_one_tensor_is_one_input() -> None:
    x = torch.ones(2)
    slots = Slots()
    assert slots.split((x, [x], 1)) == (Slot(0), [Slot(0)], 1)
    assert slots.inputs == [x]


@pytest.mark.parametrize("text", ["", "{", "[]", '["tuple",1]', '["nothing",1]', '["tuple",1,2,3,4,5,6]', "3"])
def test_a_damaged_layout_is_an_error(text: str) -> None:
    with pytest.raises(LayoutError, match="hopkit="):
        layout.loads(text)


def test_a_layout_of_another_version_is_an_error() -> None:
    text = Layout({}, {}, (), (), 0).dumps().replace(str(layout.VERSION), "99", 1)
    with pytest.raises(LayoutError, match="version 99"):
        layout.loads(text)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (torch.ones(5, 6), True),
        (torch.ones(5, 5), False),
        (torch.ones(5, 6, dtype=torch.float64), False),
        (torch.ones(5, 6, device="meta"), False),
        (torch.ones(5), False),
        (5, False),
    ],
    ids=["same", "size", "dtype", "device", "rank", "number"],
)
def test_what_fits_a_recorded_tensor(value: object, fits: bool) -> None:
    meta = Meta(torch.float32, "cpu", ("s0", "s0 + 1"))
    assert meta.fits(value, {"s0": 5}) == fits


def test_a_size_that_nobody_knows_fits_any() -> None:
    assert Meta(torch.float32, "cpu", ("u0",)).fits(torch.ones(7), {})


@pytest.mark.usefixtures("hopkit_fresh")
def test_the_text_of_a_node_is_read_again_when_the_graph_runs() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x), torch.ones(3))
    (node,) = (node for node in graph.graph.nodes if node.target is twice.operator)
    node.kwargs = {**node.kwargs, layout.KEYWORD: "damaged"}
    graph.recompile()
    with pytest.raises(LayoutError, match="hopkit="):
        graph(torch.ones(3))


@pytest.mark.usefixtures("hopkit_fresh")
def test_a_graph_does_not_run_on_a_dtype_that_it_was_not_recorded_for() -> None:
    twice = define_twice()
    graph = record(lambda x: twice(torch.sin, x), torch.ones(3))
    with pytest.raises(SignatureError, match="float64"):
        graph(torch.ones(3, dtype=torch.float64))


@pytest.mark.usefixtures("hopkit_fresh")
def test_a_class_that_is_defined_anew_is_the_one_that_a_node_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t_colors.py").write_text("import enum\nclass Color(enum.Enum):\n    RED = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    colors = importlib.import_module("t_colors")
    text = Layout({"color": colors.Color.RED}, {}, (), (), 0).dumps()
    assert layout.loads(text).values["color"] is colors.Color.RED
    colors = importlib.reload(colors)
    assert layout.loads(text).values["color"] is colors.Color.RED
    monkeypatch.delitem(sys.modules, "t_colors")
