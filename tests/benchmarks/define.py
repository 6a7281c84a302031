"""What hopkit costs before any op is called: ``import hopkit`` beside ``import torch``, and `hopkit.define`.

Run it with ``python -m tests.benchmarks.define``.

To reach: 60 ms for the import; 2 ms for define with the built-in plugins, and linear with 100 plugins and 1,000 ops.
"""

from __future__ import annotations

import subprocess
import sys
import time
import types

import torch

import hopkit
from hopkit.testing import fresh
from tests.benchmarks.timing import table

IMPORT = """
import time, torch
start = time.perf_counter()
import hopkit
print((time.perf_counter() - start) * 1e3)
"""


def import_ms() -> float:
    """Milliseconds that ``import hopkit`` adds to ``import torch``; the best of several processes."""
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in range(5)
    ]
    return min(float(run.stdout) for run in runs)


def define_ms(ops: int, plugins: int) -> float:
    """Milliseconds per op to define so many ops with so many plugins."""

    def body(f: hopkit.Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return scale * f(x)

    with fresh():
        for i in range(plugins):
            hopkit.register(_plugin(i), f"bench_{i}")
        start = time.perf_counter()
        for i in range(ops):
            hopkit.define(f"bench_op_{i}")(body)
        return (time.perf_counter() - start) * 1e3 / ops


def _plugin(number: int) -> types.SimpleNamespace:
    @hopkit.hookimpl(op=f"bench_op_{number}")
    def hopkit_fake_rule(op: hopkit.OpSpec) -> object:
        return op.body

    return types.SimpleNamespace(hopkit_fake_rule=hopkit_fake_rule)


def main() -> None:
    """Print the figures."""
    print(f"import hopkit after torch: {import_ms():.1f} ms")
    define_ms(10, 0)  # what is imported once is not define's
    rows = [(ops, plugins, f"{define_ms(ops, plugins):.3f}") for ops in (10, 100, 1000) for plugins in (0, 10, 100)]
    print(table(("ops", "plugins", "define, ms per op"), rows))


if __name__ == "__main__":
    main()
