"""Plain tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], paint: Callable[[str], str] = lambda cell: cell) -> str:
    """Aligned columns, a line per row.

    Args:
        header: The names of the columns.
        rows: The cells.
        paint: What is done to a cell that has its width already, such as giving it a colour.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Sequence[str], paint: Callable[[str], str]) -> str:
        *padded, last = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([*map(paint, padded), paint(last.rstrip())]).rstrip()

    return "\n".join([line(header, str), *(line(row, paint) for row in rows)])
