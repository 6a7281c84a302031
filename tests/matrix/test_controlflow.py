"""The table "torch against hopkit-controlflow" is what is measured: some of its cells, once more."""

from __future__ import annotations

import json

import pytest
import torch

from tests.matrix.controlflow import OPS, PATH, measure

CELLS = [
    ("cond", "gradgrad"),
    ("cond", "vmap"),
    ("while_loop", "vjp"),
    ("scan", "make_fx_symbolic"),
    ("map", "forward_mode"),
    ("associative_scan", "jvp"),
]


@pytest.mark.parametrize(("op", "column"), CELLS)
def test_a_cell_is_what_the_page_says(op: str, column: str) -> None:
    written = json.loads(PATH.read_text(encoding="utf-8"))
    found, said = measure(op, column), written["cells"][op][column]
    assert found["hopkit"] == said["hopkit"]
    if written["torch"] == torch.__version__:
        assert found["torch"] == said["torch"]


def test_nothing_of_ours_is_wrong_there() -> None:
    cells = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    assert cells.keys() == OPS.keys()
    assert {cell["hopkit"] for columns in cells.values() for cell in columns.values()} <= {"all", "-"}
