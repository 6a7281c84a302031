"""The op in graphs that AOTAutograd makes ahead of time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch.fx import GraphModule

from hopkit._torch import trees
from hopkit.testing.case import Callee, Case, Group, Outcome, Run
from hopkit.testing.derivatives import derivatives
from hopkit.testing.graphs import kept
from hopkit.testing.values import values

GROUP = Group("aot")


@GROUP.column
def aot(case: Case, callee: Callee) -> Outcome:
    """AOTAutograd, forward."""
    graphs: list[GraphModule] = []
    with torch.no_grad():
        pairs = values(case, _ahead(case, callee, graphs))
    return Outcome(pairs, kept(case, *graphs))


@GROUP.column
def aot_grad(case: Case, callee: Callee) -> Outcome:
    """AOTAutograd, forward and backward."""
    graphs: list[GraphModule] = []
    pairs = derivatives(case, _ahead(case, callee, graphs))
    return Outcome(pairs, kept(case, *graphs))


def _ahead(case: Case, callee: Callee, graphs: list[GraphModule]) -> Run:
    structure: list[trees.Tree] = []
    ahead = importlib.import_module("functorch.compile")  # it loads torch's compiler; plugins import hopkit.testing

    def flat(*tensors: torch.Tensor) -> list[object]:
        # aot_function makes a list of a tuple.
        leaves, tree = trees.flatten(case.on(callee)(*tensors))
        structure.append(tree)
        return leaves

    def keep(graph: GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return cast("Callable[..., object]", ahead.make_boxed_func(graph.forward))

    compiled = cast("Callable[..., Iterable[object]]", ahead.aot_function(flat, fw_compiler=keep))
    return lambda *tensors: trees.unflatten(list(compiled(*tensors)), structure[-1])
