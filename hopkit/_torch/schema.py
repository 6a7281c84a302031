"""Schemas of calls (torch/_higher_order_ops/schema.py): each call has its own, since its subgraphs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch._higher_order_ops.schema import HopSchemaGenerator
from torch.fx import Graph, GraphModule


def generate(
    operator: Callable[..., object],
    graphs: Sequence[Callable[..., object]],
    inputs: Sequence[object],
    nested: object,
    keywords: Mapping[str, object],
    outputs: Sequence[object],
    mutated: Sequence[int],
) -> torch.FunctionSchema:
    """``op(Any graph0, ..., Tensor input0, ...) -> (...)``, with the inputs that the op writes to marked."""
    generator = HopSchemaGenerator(cast("torch._ops.HigherOrderOperator", operator))
    for i, graph in enumerate(graphs):
        # A subgraph that was not traced yet is "Any" to the schema, as a traced one is.
        generator.add_arg(f"graph{i}", graph if isinstance(graph, GraphModule) else GraphModule({}, Graph()))
    for i, value in enumerate(inputs):
        generator.add_arg(f"input{i}", value, is_mutated=i in mutated)
    for name, value in keywords.items():
        # Neither by keyword alone nor with a default: torch passes all that the tree of the arguments has, by position.
        generator.add_arg(name, value)
    for value in outputs:
        generator.add_output(value)
    generator.add_schema_tree_spec(*graphs, nested, **keywords)
    return generator.gen_schema()
