"""The op on fake tensors."""

from __future__ import annotations

from hopkit._torch.fakes import FakeMode
from hopkit.testing.case import Callee, Case, Group, Outcome
from hopkit.testing.compare import Pair
from hopkit.testing.tensors import tensors_in
from hopkit.testing.values import metadata, seeded

GROUP = Group("fake")


@GROUP.column
def fake(case: Case, callee: Callee) -> Outcome:
    """Operands that are fake tensors."""
    expected = seeded(case.on(case.body), case.clones())
    with FakeMode(allow_non_fake_inputs=True) as mode:
        got = seeded(case.on(callee), [mode.from_tensor(t) for t in case.clones()])
    fakes = [type(t).__name__ for t in tensors_in(got)]
    return Outcome([metadata(got, expected), Pair("the result", fakes, ["FakeTensor"] * len(fakes))])
