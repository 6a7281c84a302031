"""What the tests of recording share: two tiny ops, and ways to record, to differentiate and to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import Op, Subgraph
from hopkit._torch import trees
from hopkit.op import AnyOp

Function = Callable[..., object]


def define_once() -> Op[..., Tensor]:
    @hopkit.define("t_once")
    def once(body: Subgraph, *xs: Tensor) -> Tensor:
        return body(*xs)

    return once


def define_twice() -> Op[..., Tensor]:
    @hopkit.define("t_twice")
    def twice(body: Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * body(body(x))

    return twice


def record(function: Function, *args: object, mode: Literal["real", "fake", "symbolic"] = "real") -> GraphModule:
    # Not `function` itself: fx writes annotations that are text (PEP 563) into a graph, which then does not pickle.
    return make_fx(lambda *args: function(*args), tracing_mode=mode)(*args)


def nodes(graph: torch.nn.Module, op: AnyOp) -> int:
    """How many nodes of ``op`` there are, in the graph and its subgraphs."""
    modules = [module for module in graph.modules() if isinstance(module, GraphModule)]
    return sum(node.target is op.operator for module in modules for node in module.graph.nodes)


def plainly(function: Function, *args: object) -> object:
    """What ``function`` gives where every op vanishes."""
    with hopkit.decompose(*hopkit.ops().values()):
        return function(*args)


def same(got: object, want: object) -> None:
    torch.testing.assert_close(_detached(got), _detached(want))


def _detached(value: object) -> object:
    return trees.map_only(Tensor, torch.Tensor.detach, value)


def trained(function: Function, *, second: bool = False) -> Function:
    """``function``, and its first (and second) derivatives by whatever of its arguments requires them."""

    def step(*args: Tensor) -> object:
        sources = [t for t in args if t.requires_grad]
        result = function(*args)
        first = _slopes([result], sources, create_graph=second)
        return (
            (result, first, _slopes([t.sin() for t in first if t is not None], sources)) if second else (result, first)
        )

    return step


def _slopes(outputs: object, sources: Sequence[Tensor], *, create_graph: bool = False) -> Sequence[Tensor | None]:
    results = [t for t in trees.leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    weights = [torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape).to(t.dtype) for t in results]
    return torch.autograd.grad(results, sources, weights, create_graph=create_graph, allow_unused=True)
