"""When two graphs that Dynamo read are one: the same steps, on inputs of the same kind, with the same things held."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from hopkit._torch import trees
from hopkit._torch.watch import Same


def key(graph: Graph, held: Mapping[str, object]) -> object:
    """Equal for graphs that compute the same, whatever their nodes are called.

    Args:
        graph: As Dynamo wrote it.
        held: What its ``get_attr`` and ``call_module`` nodes stand for, by name.
    """
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    def told(value: object) -> object:
        if isinstance(value, Node):
            return "node", numbers[value]
        if isinstance(value, _PLAIN):
            return type(value), repr(value)  # neither 1.0 nor True is 1, and 0.0 is not -0.0
        return value if isinstance(value, type) else Same(value)

    def step(node: Node) -> object:
        target: object = node.target
        if node.op in ("get_attr", "call_module"):
            target = Same(held.get(str(target), node))
        elif node.op == "placeholder":
            target = ""
        elif node.op == "call_function":
            target = Same(target)
        leaves, tree = trees.flatten((node.args, dict(node.kwargs)))
        example, custom = node.meta.get("example_value"), node.meta.get("custom")
        return (
            node.op,
            target,
            tuple(map(told, leaves)),
            repr(tree),
            repr(custom),
            tuple(map(_kind, trees.leaves(example))),
        )

    return tuple(map(step, graph.nodes))


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, slice, range)


def _kind(example: object) -> object:
    """What a value is known to be; symbols by their names, so that what one graph makes is not the other's."""
    if isinstance(example, torch.Tensor):
        return (
            type(example),
            example.dtype,
            example.device,
            str(tuple(example.shape)),
            str(example.stride()) if example.layout is torch.strided else "",
            example.requires_grad,
        )
    return type(example), str(example)
