"""Every op here in every mode, held against its body in plain eager PyTorch."""

from __future__ import annotations

import hopkit_controlflow
import pytest

from hopkit import Op
from hopkit.testing import Report, plan

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use

OPS = [op for op in vars(hopkit_controlflow).values() if isinstance(op, Op)]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.spec.name)
def test_an_op_is_what_its_body_is(op: Op[..., object]) -> None:
    """Of the samples, Inductor compiles the first: it takes a minute for all of them, and `hopkit check` has them."""
    trials = plan(op)
    chosen = [t for t in trials if t.column.group != "inductor" or t.sample == trials[0].sample]
    report = Report(tuple(trial.run() for trial in chosen))
    assert report.ok, str(report)
