"""The op on real operands and on the meta device."""

from __future__ import annotations

import torch

from hopkit._torch import trees
from hopkit.testing.case import Callee, Case, Group, NotApplicable, Outcome, Run
from hopkit.testing.compare import Pair
from hopkit.testing.values import metadata, requires_grad, seeded, values

GROUP = Group("device")


@GROUP.column
def eager(case: Case, callee: Callee) -> Outcome:
    """The call as it stands."""
    inputs, expected_inputs = case.clones(), case.clones()
    got, expected = seeded(case.on(callee), inputs), seeded(case.on(case.body), expected_inputs)
    flags = [Pair("requires_grad", requires_grad(got), requires_grad(expected))] if case.derives else []
    return Outcome([*values(case, case.on(callee)), *flags])


@GROUP.column
def no_grad(case: Case, callee: Callee) -> Outcome:
    """The call without gradients."""
    with torch.no_grad():
        flags = requires_grad(seeded(case.on(callee), case.clones()))
        return Outcome([*values(case, case.on(callee)), Pair("requires_grad", any(flags), False)])


@GROUP.column
def conj(case: Case, callee: Callee) -> Outcome:
    """Complex operands that are views which conjugate."""
    if not any(t.is_complex() for t in case.tensors):
        raise NotApplicable("no operand is complex")

    def lazily(*tensors: torch.Tensor) -> object:
        return case.on(callee)(*(t.conj().resolve_conj().conj() if t.is_complex() else t for t in tensors))

    return Outcome(values(case, lazily))


@GROUP.column
def neg(case: Case, callee: Callee) -> Outcome:
    """Real operands that are views which negate."""
    kinds = (torch.float32, torch.float64)
    if not any(t.dtype in kinds and t.layout is torch.strided for t in case.tensors):
        raise NotApplicable("no operand can be a view of the imaginary part of a complex tensor")

    def imaginary(run: Run, *, lazily: bool) -> Run:
        def view(t: torch.Tensor) -> torch.Tensor:
            if t.dtype not in kinds or t.layout is not torch.strided:
                return t
            zeros = torch.zeros_like(t)
            return torch.complex(zeros, -t).conj().imag if lazily else torch.complex(zeros, t).imag

        return lambda *tensors: run(*map(view, tensors))

    lazy, plain = imaginary(case.on(callee), lazily=True), imaginary(case.on(case.body), lazily=False)
    return Outcome(values(case, lazy, want=plain))


@GROUP.column
def meta(case: Case, callee: Callee) -> Outcome:
    """Operands on the meta device."""
    if not case.tensors:
        raise NotApplicable("it has no operand to put there")
    expected = seeded(case.on(case.body), case.clones())
    got = seeded(case.on(callee), [t.to("meta") for t in case.clones()])
    return Outcome([metadata(got, trees.map_only(torch.Tensor, lambda t: t.to("meta"), expected))])
