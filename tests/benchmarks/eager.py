"""What a plain eager call of ``run_const_graph`` costs: against its GraphModule, and against torch's own op.

Run it with ``python -m tests.benchmarks.eager``.

To reach (DESIGN section 7), op against direct: 2.0 with 1 and 10 operands, 3 with 100, 4 with 1000; with gradients at
most 1.5 times those.
"""

from __future__ import annotations

import torch

from hopkit_constgraph import run_const_graph
from tests.benchmarks.timing import compare, table

LIMITS = {1: 2.0, 10: 2.0, 100: 3.0, 1000: 4.0}


def graph_of(operands: int) -> torch.fx.GraphModule:
    """A graph with so many inputs that does next to nothing, so that what is measured is the call."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(f"weight{i}") for i in range(operands)]
    graph.output((graph.call_function(torch.sin, (inputs[0],)),))
    return torch.fx.GraphModule({}, graph)


def measure(operands: int, *, gradients: bool) -> tuple[float, float, float]:
    """Microseconds of the direct call, of the op, and of torch's own op."""
    graph = graph_of(operands)
    weights = tuple(torch.randn(2, requires_grad=gradients) for _ in range(operands))
    torch_op = torch.ops.higher_order.run_const_graph
    ways = {
        "direct": lambda: graph(*weights),
        "hopkit": lambda: run_const_graph(graph, weights),
        "torch": lambda: torch_op(graph, weights),
    }
    with torch.set_grad_enabled(gradients):
        best = compare(ways)
    return best["direct"], best["hopkit"], best["torch"]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rows = []
    for gradients in (False, True):
        for operands, limit in LIMITS.items():
            direct, hopkit, in_tree = measure(operands, gradients=gradients)
            reach = limit * (1.5 if gradients else 1.0)
            ratios = f"{hopkit / direct:.2f}", f"{reach:.1f}", f"{in_tree / direct:.1f}"
            rows.append((operands, "grad" if gradients else "no grad", f"{direct:.2f}", *ratios))
    print(f"torch {torch.__version__}, one thread")
    print(table(("operands", "mode", "direct us", "hopkit/direct", "to reach", "torch/direct"), rows))


if __name__ == "__main__":
    main()
