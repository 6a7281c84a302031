"""Graphs of a run: how they are recorded, what they give, and whether the op is in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit.testing.case import Callee, Case, Run
from hopkit.testing.compare import Pair
from hopkit.testing.values import values

TracingMode = Literal["real", "fake", "symbolic"]


def trace(case: Case, run: Run, tracing_mode: TracingMode = "real", *, pre_dispatch: bool = False) -> GraphModule:
    """The graph that ``make_fx`` records of a run."""
    return make_fx(run, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(*case.clones())


def rerun(case: Case, graph: Run, *, want: Run | None = None) -> list[Pair]:
    """A graph on other inputs than it was recorded with."""
    return [pair for tensors in case.others for pair in values(case, graph, tensors, want=want)]


def kept(case: Case, *graphs: torch.nn.Module) -> str:
    """Whether the op is a node of the graphs."""
    modules = [m for graph in graphs for m in graph.modules() if isinstance(m, GraphModule)]
    count = sum(node.target is case.op.operator for m in modules for node in m.graph.nodes)
    return f"kept, {count} node{'s' if count > 1 else ''}" if count else "decomposed"


def compiled(case: Case, callee: Callee, **settings: object) -> Run:
    """A call of ``callee`` compiled in one piece, with these settings of ``torch.compile``."""
    torch.compiler.reset()

    def entry(args: Iterable[object], kwargs: dict[str, object]) -> object:
        return callee(*args, **kwargs)

    run = torch.compile(entry, fullgraph=True, **settings)  # type: ignore[call-overload] # its own settings
    return lambda *tensors: run(*case.arguments(tensors))
