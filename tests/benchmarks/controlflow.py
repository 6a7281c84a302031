"""What hopkit-controlflow's ops cost, against torch's own: eager and compiled, forward and training.

Run it with ``python -m tests.benchmarks.controlflow``; ``compile`` after it is for the time to compile alone.

To reach, hopkit against torch: 1.0 in every cell, and 1.1 of the time to compile.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import hopkit_controlflow
import torch
from torch import Tensor

from hopkit._torch.inductor import set_up
from hopkit._torch.namespace import in_tree
from tests.benchmarks.timing import compare, table

REACH = 1.0
COMPILE_REACH = 1.1

Function = Callable[..., Any]
Case = tuple[Function, Function, Function]
"""torch's op, hopkit's, and what to do with one of them: ``run(op, x, w)``."""


def _cond(op: Function, x: Tensor, w: Tensor) -> Any:
    return op(x.sum() > 0, lambda x: (x @ w).tanh() + x, lambda x: (x @ w).sigmoid() - x, (x,))


def _while_loop(op: Function, x: Tensor, w: Tensor) -> Any:
    return op(lambda i, x: i < 20, lambda i, x: (i + 1, (x @ w).tanh() + x), (torch.tensor(0), x))[1]


def _scan(op: Function, x: Tensor, w: Tensor) -> Any:
    def step(c: Tensor, x: Tensor) -> Any:
        c = (c @ w).tanh() * 0.5 + x
        return c, (c + x).sin()  # torch's cannot be trained where one is computed of the other alone

    return op(step, torch.zeros_like(x[0]), x)[1]


def _map(op: Function, x: Tensor, w: Tensor) -> Any:
    return op(lambda x: (x @ w).tanh() + x, x)


def _associative_scan(op: Function, x: Tensor, w: Tensor) -> Any:
    return op(lambda a, b: a * b + w[0], x, 0, combine_mode="generic")


CASES: dict[str, Case] = {
    "cond": (torch.cond, hopkit_controlflow.cond, _cond),
    "while_loop": (torch.while_loop, hopkit_controlflow.while_loop, _while_loop),
    "scan": (in_tree("scan"), hopkit_controlflow.scan, _scan),
    "map": (in_tree("map"), hopkit_controlflow.map, _map),
    "associative_scan": (in_tree("associative_scan"), hopkit_controlflow.associative_scan, _associative_scan),
}


def measure(case: Case, size: int, *, compiled: bool, training: bool) -> str:
    """How many times as long hopkit's op takes as torch's. "-": torch's cannot."""
    theirs, ours, run = case
    x, w = (torch.randn(n, size).div(size).requires_grad_(training) for n in (20, size))

    def way(op: Function) -> Function:
        torch.compiler.reset()
        function = torch.compile(lambda x, w: run(op, x, w), fullgraph=True) if compiled else lambda x, w: run(op, x, w)
        if not training:
            return lambda: function(x, w)
        return lambda: torch.autograd.grad(function(x, w).sum(), (x, w))

    try:
        way(theirs)()
    except Exception:  # whatever torch's op raises here, there is nothing to compare with
        return "-"
    best = compare({"torch": way(theirs), "hopkit": way(ours)})
    return f"{best['hopkit'] / best['torch']:.2f}"


def compiling(case: Case, *, training: bool) -> tuple[str, ...]:
    """The seconds that compiling torch's op takes, and how many times as long hopkit's takes. "-": torch's cannot."""
    theirs, ours, run = case
    x, w = (torch.randn(n, 8).requires_grad_(training) for n in (20, 8))

    def once(op: Function) -> float:
        torch.compiler.reset()
        start = time.perf_counter()
        y = torch.compile(lambda x, w: run(op, x, w), fullgraph=True)(x, w)
        if training:
            torch.autograd.grad(y.sum(), (x, w))
        return time.perf_counter() - start

    with set_up(force_disable_caches=True):
        try:
            once(theirs)
        except Exception:  # as in `measure`
            return "-", "-"
        once(ours)
        pairs = [(once(theirs), once(ours)) for _ in range(COMPILED)]
    best = [min(times) for times in zip(*pairs, strict=True)]
    return f"{best[0]:.2f}", f"{best[1] / best[0]:.2f}"


COMPILED = 3


def compile_times() -> None:
    """Print the table of the time to compile."""
    rows = []
    for name, case in CASES.items():
        rows.append((name, *(cell for training in (False, True) for cell in compiling(case, training=training))))
        print(*rows[-1], flush=True)
    print(f"torch {torch.__version__}; seconds of torch's op, and hopkit / torch, to reach: {COMPILE_REACH}")
    print(table(("op", "forward", "ratio", "training", "ratio"), rows))


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    if "compile" in sys.argv[1:]:
        compile_times()
        return
    kinds = [
        (compiled, training, size) for compiled in (False, True) for training in (False, True) for size in (8, 128)
    ]
    rows = []
    for name, case in CASES.items():
        rows.append((name, *(measure(case, size, compiled=c, training=t) for c, t, size in kinds)))
        print(*rows[-1], flush=True)
    header = [f"{'compiled' if c else 'eager'} {'training' if t else 'forward'} {size}" for c, t, size in kinds]
    print(f"torch {torch.__version__}, one thread; hopkit / torch, to reach: {REACH}")
    print(table(("op", *header), rows))
    compile_times()


if __name__ == "__main__":
    main()
