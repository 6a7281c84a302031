"""For authors of ops and plugins: hold an op against its body, and a host of its own for every test."""

from hopkit.kit import fresh
from hopkit.testing.check import Trial, check, plan
from hopkit.testing.report import HEADER, Cell, Report, Verdict

__all__ = ["HEADER", "Cell", "Report", "Trial", "Verdict", "check", "fresh", "plan"]
