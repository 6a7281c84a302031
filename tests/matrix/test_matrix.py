"""Every sample op in every mode, those of installed plugins included, held against its body in plain eager PyTorch."""

from __future__ import annotations

import pytest

from hopkit.testing import Report, plan
from hopkit.testing.columns import columns
from tests.samples import OPS

ONE_DTYPE = "no sample of this op has complex operands"
DECIDES = "the body decides on a value, which tensors have not got here; torch refuses the body alone as well"

EMPTY = {
    **{(op, "conj"): ONE_DTYPE for op in OPS if op != "region"},
    **{(op, mode): DECIDES for op in ("branch", "loop") for mode in ("vmap",)},
    ("trees", "vmap"): "vmap returns tensors alone, and the result holds None",
}
"""The cells in which nothing can be compared, and why."""


@pytest.mark.parametrize("mode", columns())
@pytest.mark.parametrize("op", OPS)
def test_an_op_is_what_its_body_is(op: str, mode: str) -> None:
    # By the column, since a mode may also be the name of a group of them.
    trials = [trial for trial in plan(OPS[op]) if trial.column.name == mode]
    if mode in ("inductor", "inductor_grad"):  # each compiles for a second or more; the last training, forward as well
        trials = trials[:1] if mode == "inductor" else [*trials[:1], *trials[1:][-1:]]
    report = Report(tuple(trial.run() for trial in trials))
    assert not [cell for cell in report.cells if cell.verdict not in ("right", "n/a")], report
    assert any(cell.verdict == "right" for cell in report.cells) != ((op, mode) in EMPTY), report


def test_a_plugin_brings_columns() -> None:
    """hopkit-example has a dispatch mode and a tensor class, and no line about any op here."""
    assert {"log_ops", "made"} <= columns().keys()
