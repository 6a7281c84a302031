"""What a run gives, next to what the body gives: values, and what is known without them."""

from __future__ import annotations

import torch

from hopkit.testing.case import Case, Run
from hopkit.testing.compare import Pair
from hopkit.testing.tensors import Tensors, detached, tensors_in


def seeded(run: Run, tensors: Tensors) -> object:
    """What ``run`` gives where every run draws the same random numbers."""
    torch.manual_seed(0)
    return run(*tensors)


def values(case: Case, run: Run, tensors: Tensors | None = None, *, want: Run | None = None) -> list[Pair]:
    """What ``run`` gives on clones of the tensors, and what is in them afterwards."""
    inputs, expected_inputs = case.clones(tensors), case.clones(tensors)
    expected = seeded(want or case.on(case.body), expected_inputs)
    got = seeded(run, inputs)
    return [
        Pair("the value", detached(got), detached(expected)),
        Pair("an operand afterwards", detached(inputs), detached(expected_inputs)),
    ]


def metadata(got: object, want: object) -> Pair:
    """Results whose numbers are not there, or say nothing."""
    return Pair("the result", got, want, values=False)


def requires_grad(value: object) -> list[bool]:
    """The flag of every tensor in a result."""
    return [t.requires_grad for t in tensors_in(value)]
