"""``check``: an op's samples in every mode, held against the body in plain eager PyTorch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, cast

import torch

from hopkit._torch import trees
from hopkit.errors import HopkitError, HopkitWarning, SpecError
from hopkit.op import AnyOp
from hopkit.spec import Sample
from hopkit.table import table
from hopkit.testing.case import Callee, Case, Column, NotApplicable, Outcome
from hopkit.testing.columns import COLUMNS
from hopkit.testing.compare import difference

Verdict = Literal["right", "wrong", "refused", "error", "n/a"]
Progress = Callable[[int, int, str], None]
"""Told before every cell: how many are done, how many there are, and what comes."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One op, on one sample, in one mode.

    Args:
        op: torch's name of the op.
        sample: The sample's name, or its number.
        mode: The column.
        verdict: "right": compared, and the same. "wrong": compared, and different. "refused": hopkit says why it does
            not. "error": something else was raised. "n/a": the body alone cannot be run there either.
        error: The largest error; None where nothing was compared.
        seconds: How long it took.
        note: What is wrong, why there is no answer, or a remark.
    """

    op: str
    sample: str
    mode: str
    verdict: Verdict
    error: float | None
    seconds: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong here."""
        return self.verdict not in ("wrong", "error")

    def __str__(self) -> str:
        return f"op '{self.op}', sample {self.sample}, mode {self.mode}: {self.verdict}. {self.note}".rstrip(". ")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found; prints as a table."""

    cells: tuple[Cell, ...]

    @property
    def ok(self) -> bool:
        """Whether no cell is wrong or raised an error, and at least one was compared."""
        return all(cell.ok for cell in self.cells) and any(cell.verdict == "right" for cell in self.cells)

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells as text, below `HEADER`."""
        return [
            (c.mode, c.sample, c.verdict, "" if c.error is None else f"{c.error:.1e}", f"{c.seconds:.2f} s", c.note)
            for c in self.cells
        ]

    def summary(self) -> str:
        """How many cells have which verdict, in one line."""
        counts: dict[str, int] = {}
        for cell in self.cells:
            counts[cell.verdict] = counts.get(cell.verdict, 0) + 1
        return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing was checked"

    def __str__(self) -> str:
        return f"{table(HEADER, self.rows())}\n\n{self.summary()}"

    def as_json(self) -> dict[str, object]:
        """The report as plain data; an error that is no finite number is None."""
        cells = [dataclasses.asdict(cell) for cell in self.cells]
        for cell in cells:
            if cell["error"] is not None and not math.isfinite(cell["error"]):
                cell["error"] = None
        return {"ok": self.ok, "cells": cells}


HEADER = ("mode", "sample", "verdict", "error", "time", "note")


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
    if refusal is not None and case.op.spec.name in str(refusal):
        return "refused", None, str(refusal)
    try:
        column.run(case, case.body)
    except Exception as without:  # the same column, without hopkit
        return "n/a", None, f"the body alone cannot be run here: {_line(without)}"
    return "error", None, _line(error)


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
    """
    columns = _chosen(modes)
    given = list(op.spec.samples() if samples is None and op.spec.samples else samples or ())
    if not given:
        raise SpecError(
            f"op '{op.spec.name}'",
            "has no samples",
            why="there is nothing to run and to compare",
            todo="Declare `samples=lambda: [hopkit.Sample(args), ...]` in define, or pass them to `check`",
        )
    cases = [(Case(op, sample), sample.name or str(number)) for number, sample in enumerate(given)]
    return [Trial(case, name, column) for column in columns for case, name in cases]


def _chosen(modes: Sequence[str] | None) -> list[Column]:
    groups = {column.group for column in COLUMNS.values()}
    for mode in modes or ():
        if mode not in COLUMNS and mode not in groups:
            close = difflib.get_close_matches(mode, [*COLUMNS, *groups], 1)
            meant = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"there is no mode {mode!r}{meant} (there are {', '.join(COLUMNS)})")
    return [c for c in COLUMNS.values() if modes is None or c.name in modes or c.group in modes]


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
        A report that prints as a table; ``report.ok`` says whether anything is wrong.

    Raises:
        SpecError: There are no samples.
        ValueError: There is no such mode.
    """
    trials = plan(op, samples, modes=modes)
    cells = []
    for done, trial in enumerate(trials):
        if progress is not None:
            progress(done, len(trials), str(trial))
        cells.append(trial.run())
    return Report(tuple(cells))
