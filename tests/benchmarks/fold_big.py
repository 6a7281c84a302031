"""How long it takes to fold a program of a billion parameters, and how much memory beside its weights.

python -m tests.benchmarks.fold_big [--device meta] [--layers N] [--size N]
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hopkit_constgraph import Policy, fold, report_of

RANK, PARTS = 8, 4


class Block(nn.Module):
    """Linear layers with low-rank updates."""

    def __init__(self, size: int, device: str) -> None:
        super().__init__()
        shapes = {"base": (size, size), "down": (RANK, size), "up": (size, RANK)}
        for name, shape in shapes.items():
            for number in range(PARTS):
                weight = torch.full(shape, 0.01, dtype=torch.bfloat16, device=device)
                self.register_parameter(f"{name}{number}", nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        """The layers, with their input added."""
        for number in range(PARTS):
            base, down, up = (self.get_parameter(f"{name}{number}") for name in ("base", "down", "up"))
            x = x + nn.functional.linear(x, base + up @ down)
        return x


@contextmanager
def told(what: str, weights: int) -> Iterator[None]:
    """Print what the inside took: time, and the most memory so far, beside that of the weights."""
    start = time.perf_counter()
    yield
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    beside = f"{most / weights:6.2f} times the weights" if weights else ""
    print(f"{what:<28} {time.perf_counter() - start:6.1f} s   at most {most / 1e9:6.2f} GB {beside}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "meta"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--size", type=int, default=4096)
    chosen = parser.parse_args()
    model = nn.Sequential(*(Block(chosen.size, chosen.device) for _ in range(chosen.layers)))
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = 2 * count if chosen.device == "cpu" else 0
    x = torch.zeros(1, 4, chosen.size, dtype=torch.bfloat16, device=chosen.device)
    with told("export", weights):
        program = torch.export.export(model, (x,))
    print(f"{count / 1e9:.2f} billion parameters, {len(program.graph.nodes)} nodes")
    with told("fold the program", weights):
        folded = fold(program)
    print(report_of(folded).summary())
    with told("fold the module", weights):
        module = fold(model, (x,))
    if weights:
        with told("first call", weights), torch.no_grad():
            module(x)
        del module, folded
        gc.collect()  # torch's graphs are circles
        with told("fold and release", weights):
            fold(program, policy=Policy(release=True))


if __name__ == "__main__":
    main()
