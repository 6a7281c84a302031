"""Schemas of calls (torch/_higher_order_ops/schema.py): each call has its own, since its subgraphs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch._higher_order_ops.schema import HopSchemaGenerator
from torch.fx import Graph, GraphModule


def generate(
    operator: torch._ops.HigherOrderOperator,
    graphs: Sequence[Callable[..., object]],
    inputs: Sequence[object],
    nested: object,
    keywords: Mapping[str, object],
    outputs: Sequence[object],
    mutated: Sequence[int],
) -> torch.FunctionSchema:
    """``op(Any graph0, ..., Tensor input0, ...) -> (...)``, with the inputs that the op writes to marked."""
    generator = HopSchemaGenerator(operator)
    for i, graph in enumerate(graphs):
        # A subgraph that was not traced yet is "Any" to the schema, as a traced one is.
        generator.add_arg(f"graph{i}", graph if isinstance(graph, GraphModule) else GraphModule({}, Graph()))
    for i, value in enumerate(inputs):
        generator.add_arg(f"input{i}", value, is_mutated=i in mutated)
    for name, value in keywords.items():
        generator.add_arg(name, value, default_value=value, kw_only=True)
    for value in outputs:
        generator.add_output(value)
    generator.add_schema_tree_spec(*graphs, nested, **keywords)
    return generator.gen_schema()
