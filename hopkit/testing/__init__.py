"""For authors of ops and plugins: hold an op against its body, and a host of its own for every test."""

from hopkit.kit import fresh
from hopkit.testing.check import HEADER, Cell, Report, Trial, Verdict, check, plan

__all__ = ["HEADER", "Cell", "Report", "Trial", "Verdict", "check", "fresh", "plan"]
