"""What a check finds: a verdict for every op, sample and mode."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from hopkit.table import table

Verdict = Literal["right", "wrong", "refused", "error", "n/a"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One op, on one sample, in one mode.

    Args:
        op: torch's name of the op.
        sample: The sample's name, or its number; "any" for what is wrong whatever the sample.
        mode: The column.
        verdict: "right": compared, and the same. "wrong": compared, and different. "refused": hopkit says why it does
            not. "error": something else was raised. "n/a": the body alone, or what is declared in its place, cannot be
            run there either.
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
