"""For authors of ops and plugins: hold an op against its body, and a host of its own for every test."""

from hopkit.kit import fresh
from hopkit.testing.case import Case, Column, Group, NotApplicable, Outcome
from hopkit.testing.check import Trial, check, plan
from hopkit.testing.compare import Pair
from hopkit.testing.derivatives import outcome, outcome_of_class
from hopkit.testing.report import HEADER, Cell, Report, Verdict

__all__ = [
    "HEADER",
    "Case",
    "Cell",
    "Column",
    "Group",
    "NotApplicable",
    "Outcome",
    "Pair",
    "Report",
    "Trial",
    "Verdict",
    "check",
    "fresh",
    "outcome",
    "outcome_of_class",
    "plan",
]
