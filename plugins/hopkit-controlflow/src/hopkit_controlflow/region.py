"""``region``: a part of a program that stays one node."""

from __future__ import annotations

from typing import TypeVar

import torch

import hopkit

T = TypeVar("T")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_region`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    return [hopkit.Sample((torch.sin, (x,))), hopkit.Sample((torch.add, (x, x + 1)), name="two operands")]


@hopkit.define("controlflow_region", samples=samples)
def region(body: hopkit.Subgraph[T], operands: tuple[object, ...] = ()) -> T:
    """``body(*operands)``, kept as one node of a recorded graph."""
    return body(*operands)
