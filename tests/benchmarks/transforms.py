"""What an op costs under a transform of torch.func, against its body under the same transform.

Run it with ``python -m tests.benchmarks.transforms``.

To reach, op against body: 1.1, in plain eager and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import hopkit
from hopkit import Subgraph
from tests.benchmarks.timing import compare, table

REACH = 1.1

Function = Callable[..., Any]


@hopkit.define("benchmark_steps")
def steps(body: Subgraph, x: Tensor) -> Tensor:
    """Apply ``body`` to the running sum of its results, row by row."""
    total = x[0]
    for row in x.unbind(0):
        total = total + body(row)
    return total


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "vmap": lambda f: vmap(f, in_dims=(None, 0)),
    "jvp": lambda f: lambda w, xs: jvp(lambda w: f(w, xs[0]), (w,), (w,)),
    "grad": lambda f: lambda w, xs: grad(lambda w: f(w, xs[0]).sum())(w),
    "vjp": lambda f: lambda w, xs: vjp(lambda x: f(w, x), xs[0])[1](xs[0, 0]),
    "vmap of grad": lambda f: vmap(grad(lambda w, x: f(w, x).sum()), in_dims=(None, 0)),
    "jacrev": lambda f: lambda w, xs: jacrev(lambda x: f(w, x).sum(0, keepdim=True))(xs[0]),
    "jacfwd": lambda f: lambda w, xs: jacfwd(lambda scale: f(w * scale, xs[0]))(xs[0, 0, :1]),
    "hessian": lambda f: lambda w, xs: hessian(lambda scale: f(w * scale, xs[0]).sum())(xs[0, 0, :1]),
}


def measure(transform: Callable[[Function], Function], size: int, *, compiled: bool) -> float:
    """How many times as long the op takes as its body."""
    weight, xs = torch.randn(size, size) / size, torch.randn(4, 3, size)

    def of(call: Function) -> Callable[[], object]:
        run = transform(lambda w, x: call(lambda y: torch.tanh(w @ y), x))
        run = torch.compile(run, fullgraph=True) if compiled else run
        return lambda: run(weight, xs)

    best = compare({"body": of(steps.spec.body), "op": of(steps)})
    return best["op"] / best["body"]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rows = []
    for name, transform in TRANSFORMS.items():
        ratios = [measure(transform, size, compiled=compiled) for compiled in (False, True) for size in (2, 256)]
        rows.append((name, *(f"{ratio:.2f}" for ratio in ratios)))
        torch.compiler.reset()
    print(f"torch {torch.__version__}, one thread; op / body, to reach: {REACH}")
    print(table(("transform", "eager 2x2", "eager 256x256", "compiled 2x2", "compiled 256x256"), rows))


if __name__ == "__main__":
    main()
