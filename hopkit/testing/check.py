"""``check``: an op's samples in every mode, held against the body in plain eager PyTorch."""

from __future__ import annotations

import dataclasses
import difflib
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch

from hopkit._torch import trees
from hopkit.deciding import undecided
from hopkit.errors import CaptureError, HopkitError, HopkitWarning, RuleConflictError, SpecError
from hopkit.explain import explain
from hopkit.op import AnyOp
from hopkit.spec import Sample
from hopkit.testing.case import Callee, Case, Column, NotApplicable, Outcome
from hopkit.testing.columns import columns
from hopkit.testing.compare import difference
from hopkit.testing.report import Cell, Report, Verdict

Progress = Callable[[int, int, str], None]
"""Told before every cell: how many are done, how many there are, and what comes."""

BODY_RUNS = ("autograd", "func")
"""Groups of columns in which the body runs as it stands, whatever is declared: torch decides what it can do there."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A cell that has not been run yet."""

    case: Case
    sample: str
    column: Column

    def __str__(self) -> str:
        return f"{self.column.name}-{self.sample}"

    def run(self) -> Cell:
        """Run the sample in the mode, and compare."""
        start = time.perf_counter()
        with torch.random.fork_rng(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", HopkitWarning)
            verdict, error, note = _judge(self.case, self.column)
        seconds = time.perf_counter() - start
        notes = "; ".join(dict.fromkeys(told for told in (note, *(str(w.message) for w in caught)) if told))
        return Cell(self.case.op.spec.name, self.sample, self.column.name, verdict, error, seconds, notes)


def _judge(case: Case, column: Column) -> tuple[Verdict, float | None, str]:
    try:
        outcome = column.run(case, cast("Callee", case.op))
    except NotApplicable as reason:
        return "n/a", None, str(reason)
    except Exception as error:  # whatever a mode raises is what this cell found
        return _failed(case, column, error)
    return _compared(outcome)


def _compared(outcome: Outcome) -> tuple[Verdict, float | None, str]:
    if not outcome.pairs or not trees.leaves(outcome.pairs[0].want):
        return "error", None, "nothing was compared"
    found = [difference(pair) for pair in outcome.pairs]
    largest = max(error for error, _ in found)
    told = [told for _, told in found if told]
    return ("wrong", largest, told[0]) if told else ("right", largest, outcome.note)


def _failed(case: Case, column: Column, error: Exception) -> tuple[Verdict, float | None, str]:
    refusal = _refusal(error)
    ours = refusal is not None and case.op.spec.name in str(refusal)
    verdict: Verdict = "refused" if ours and not isinstance(refusal, RuleConflictError) else "error"
    # What a mode cannot close over, or decide on, it cannot in the body either.
    if ours and not isinstance(refusal, CaptureError) and not undecided(refusal):
        return verdict, None, str(refusal)
    try:
        column.run(case, case.body if column.group in BODY_RUNS else case.declared)
    except Exception as without:  # the same column, without hopkit
        return "n/a", None, f"the body alone cannot be run here: {_line(without)}"
    return verdict, None, str(refusal) if ours else _line(error)


def _refusal(error: BaseException | None) -> HopkitError | None:
    """hopkit's own error, also where torch wrapped it."""
    while error is not None and not isinstance(error, HopkitError):
        error = error.__cause__ or error.__context__
    return error


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def plan(op: AnyOp, samples: Iterable[Sample] | None = None, *, modes: Sequence[str] | None = None) -> list[Trial]:
    """The cells of a check, not run yet.

    Args:
        op: The op.
        samples: Example calls. None: those that the op was defined with.
        modes: Columns ("make_fx_fake") and groups of them ("proxy"). None: every column.

    Raises:
        SpecError: There are no samples.
        ValueError: There is no such mode.
        PluginError: A plugin adds what is no column.
    """
    chosen = _chosen(modes)
    given = list(op.spec.samples() if samples is None and op.spec.samples else samples or ())
    if not given:
        raise SpecError(
            f"op '{op.spec.name}'",
            "has no samples",
            why="there is nothing to run and to compare",
            todo="Declare `samples=lambda: [hopkit.Sample(args), ...]` in define, or pass them to `check`",
        )
    cases = [(Case(op, sample), sample.name or str(number)) for number, sample in enumerate(given)]
    return [Trial(case, name, column) for column in chosen for case, name in cases]


def _chosen(modes: Sequence[str] | None) -> list[Column]:
    known = columns()
    groups = {column.group for column in known.values()}
    for mode in modes or ():
        if mode not in known and mode not in groups:
            close = difflib.get_close_matches(mode, [*known, *groups], 1)
            meant = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"there is no mode {mode!r}{meant} (there are {', '.join(known)})")
    return [c for c in known.values() if modes is None or c.name in modes or c.group in modes]


def check(
    op: AnyOp,
    samples: Iterable[Sample] | None = None,
    *,
    modes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run an op's samples in every mode, and compare with its body in plain eager PyTorch.

    Args:
        op: The op.
        samples: Example calls. None: those that the op was defined with.
        modes: As in `plan`.
        progress: Told before every cell.

    Returns:
        A report that prints as a table; ``report.ok`` says whether anything is wrong. A mode in which plugins are in
        conflict has a cell of its own, whether a column gets there or not.

    Raises:
        SpecError: There are no samples.
        ValueError: There is no such mode.
        PluginError: A plugin adds what is no column.
    """
    trials = plan(op, samples, modes=modes)
    conflicts = [row for row in explain(op).rows if row.kind == "conflict"]
    cells = [Cell(op.spec.name, "any", row.mode, "error", None, 0.0, row.note) for row in conflicts]
    for done, trial in enumerate(trials):
        if progress is not None:
            progress(done, len(trials), str(trial))
        cells.append(trial.run())
    return Report(tuple(cells))
