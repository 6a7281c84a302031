"""The op in programs that ``torch.export`` makes, saved and loaded."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import cast

import torch

from hopkit._torch import trees
from hopkit.testing.case import Callee, Case, Group, Outcome, Run
from hopkit.testing.graphs import kept, rerun
from hopkit.testing.values import values

GROUP = Group("export")


@GROUP.column
def exported(case: Case, callee: Callee) -> Outcome:
    """torch.export, saved and loaded."""
    return _round(case, callee, strict=False)


@GROUP.column
def exported_strict(case: Case, callee: Callee) -> Outcome:
    """torch.export with ``strict=True``, saved and loaded."""
    return _round(case, callee, strict=True)


class _Model(torch.nn.Module):
    """The call; what it gives, flat, as a file holds no classes of the user's."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def forward(self, *tensors: torch.Tensor) -> list[object]:
        return trees.leaves(self._run(*tensors))


def _round(case: Case, callee: Callee, *, strict: bool) -> Outcome:
    torch.compiler.reset()
    with torch.no_grad():
        _, structure = trees.flatten(case.on(case.body)(*case.clones()))
        program = torch.export.export(_Model(case.on(callee)), tuple(case.clones()), strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        module = loaded.module()

        def run(*tensors: torch.Tensor) -> object:
            return trees.unflatten(cast("Iterable[object]", module(*tensors)), structure)

        pairs = [*values(case, run), *rerun(case, run)]
    return Outcome(pairs, kept(case, loaded.graph_module))
