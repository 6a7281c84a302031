"""How the benchmarks measure: several ways to do one thing, interleaved, so that a busy machine slows all of them."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Mapping, Sequence

ROUNDS = 25


def compare(
    ways: Mapping[str, Callable[[], object]], *, seconds: float = 0.02, timer: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The best time of each way over interleaved rounds.

    Args:
        ways: What to time, by name.
        seconds: How long one round of one way takes, about.
        timer: What is read. `time.process_time` leaves out what other processes take, of what one thread does.

    Returns:
        Microseconds per call, by name.
    """
    counts = {name: max(1, int(seconds / _once(way))) for name, way in ways.items()}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            best[name] = min(best[name], timeit.timeit(way, number=counts[name], timer=timer) / counts[name] * 1e6)
    return best


def _once(way: Callable[[], object]) -> float:
    way()
    return timeit.timeit(way, number=3) / 3


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned table."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
