"""Folded models beside the models as they are, folded by hand, with torch's own op, and frozen; ratios in one run.

pip install -e '.[benchmarks]'
python -m tests.benchmarks.fold [WORD IN A TITLE] [--threads N]
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from hopkit._torch.inductor import set_up
from hopkit._torch.seen import NATIVE
from hopkit.extend import table
from hopkit_constgraph import fold, run_const_graph_once
from tests.benchmarks.fold_models import Candidate, candidates

ROUNDS, SECONDS = 40, 0.03
clock = time.process_time

Runs = Mapping[str, Callable[[], object]]


def seconds(runs: Runs) -> dict[str, float]:
    """The least time of a call, each measured in turn: of the processor, of which others may have a part."""
    least = dict.fromkeys(runs, float("inf"))
    calls = {}
    for name, run in runs.items():
        run()
        start = clock()
        run()
        calls[name] = max(1, round(SECONDS / (clock() - start)))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = clock()
            for _ in range(calls[name]):
                run()
            least[name] = min(least[name], (clock() - start) / calls[name])
    return least


def in_tree(folded: Any) -> GraphModule:
    """The folded model with torch's op in place of ours: it computes its graph at every call."""
    made: GraphModule = copy.deepcopy(folded)
    for node in made.graph.find_nodes(op="call_function", target=run_const_graph_once.operator):
        node.target = torch.ops.higher_order.run_const_graph
    made.recompile()
    return made


def ways(found: Candidate) -> dict[str, Callable[[], object]]:
    """The ways to run a model, each of which has run."""
    torch.compiler.reset()
    folded = fold(found.model, (found.example,), policy=found.policy)
    eager: dict[str, Any] = {
        "by hand": found.by_hand,
        "as it is": found.model,
        "folded": folded,
        "torch's op": in_tree(folded),
    }
    runs: dict[str, Callable[[], object]] = {}
    for name, model in eager.items():
        runs[name] = functools.partial(model, found.example)
        runs[f"{name}, compiled"] = functools.partial(torch.compile(model), found.example)
    with set_up(freezing=True):
        frozen = torch.compile(copy.deepcopy(found.model))
        frozen(found.example)
    runs["frozen, compiled"] = functools.partial(frozen, found.example)
    want = found.by_hand(found.example)
    for run in runs.values():
        torch.testing.assert_close(run(), want, rtol=1e-3, atol=1e-3)
    return runs


def row(found: Candidate) -> list[str]:
    """The time of the model that is folded by hand, and what the others take of it."""
    least = seconds(ways(found))
    cells = [found.title]
    for kind in ("", ", compiled"):
        base = least[f"by hand{kind}"]
        cells.append(f"{base * 1e3:.2f} ms")
        cells += [f"{least[n + kind] / base:.3f}" if n + kind in least else "" for n in COLUMNS]
    return cells


COLUMNS = ("as it is", "torch's op", "frozen", "folded")
HEADER = ("model", "by hand", *COLUMNS, "by hand, compiled", *COLUMNS)


def checked() -> float:
    """The time of a call that finds a thousand weights unchanged."""
    weights = tuple(nn.Parameter(torch.zeros(4, 4)) for _ in range(1000))
    graph = Graph()
    given = [graph.placeholder(f"weight_{number}") for number in range(len(weights))]
    graph.output((graph.call_function(torch.neg, (given[0],)),))
    module = GraphModule({}, graph)
    return seconds({"check": lambda: run_const_graph_once(module, weights)})["check"]


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("word", nargs="?", default="", help="only models with this in their title")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    NATIVE.ask()
    if NATIVE.builder is not None:
        NATIVE.builder.join()
    rows = [row(found) for found in candidates() if chosen.word in found.title]
    print(f"torch {torch.__version__}, {chosen.threads} threads: time of a call, against the model folded by hand\n")
    print(table(HEADER, rows))
    print(f"\n1000 weights that have not changed: {checked() * 1e6:.1f} us")


if __name__ == "__main__":
    main()
