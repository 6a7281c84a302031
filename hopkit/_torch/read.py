"""What Dynamo read of a subgraph: its graph, and what that takes from outside (meta["example_value"]; 2.13, 2.14)."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from hopkit._torch import sizes, trees


class Instead(enum.Enum):
    """What Dynamo reads for a call that is no node. Not NotImplemented: a torch-function mode would take it for its."""

    BODY = "the op's body is to be read in its place"


@dataclasses.dataclass(frozen=True)
class Read:
    """A subgraph that Dynamo read on one signature.

    Args:
        graph: What it read. Takes ``sizes``, then the tensors and symbols of the arguments, then ``captured``.
        slots: How many arguments it takes.
        sizes: ``(position among the arguments, dimension)`` of sizes that only the op's body makes.
        captured: What the subgraph uses from outside, as Dynamo's stand-ins.
        gives: Its result's structure, and per leaf a constant in a tuple; None stands for the graph's next output.
    """

    graph: Graph
    run: Callable[..., Sequence[object]]
    slots: int
    sizes: tuple[tuple[int, int], ...]
    captured: tuple[object, ...]
    gives: tuple[trees.Tree, tuple[tuple[object, ...] | None, ...]]

    def __call__(self, inputs: Sequence[object]) -> object:
        """The subgraph's result on stand-ins."""
        made = [cast("torch.Tensor", inputs[i]).shape[dim] for i, dim in self.sizes]
        outputs = iter(self.run(*made, *inputs, *self.captured))
        tree, leaves = self.gives
        return trees.unflatten([next(outputs) if leaf is None else leaf[0] for leaf in leaves], tree)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The captured tensors. The other captures are sizes, which tensors tell."""
        return [value for value in self.captured if isinstance(value, torch.Tensor)]

    def closed(self, captured: Sequence[object], modules: Mapping[str, object]) -> GraphModule:
        """What was read as a graph of its arguments and of just these captured values, in this order.

        Args:
            captured: What it is to take from outside.
            modules: The graphs that are called in it, by name.

        Raises:
            LookupError: It uses a size that is in neither.
        """
        old = self.graph.find_nodes(op="placeholder")
        made, taken, lifted = _split(old, len(self.sizes), self.slots)
        graph, env = Graph(), {}
        for node in taken:
            env[node] = graph.node_copy(node)
        numbers = {identity(value): number for number, value in enumerate(captured)}
        first = {identity(value): node for value, node in zip(self.captured, lifted, strict=True)}
        new = []
        for value in captured:
            node = graph.placeholder(first[identity(value)].name)
            node.meta = dict(first[identity(value)].meta)
            new.append(node)

        def size(wanted: object, tensor: Node, dim: int) -> Node:
            node = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
            node.meta["example_value"] = wanted
            return node

        for node, (i, dim) in zip(made, self.sizes, strict=True):
            env[node] = size(node.meta["example_value"], env[taken[i]], dim)
        tensors = [*(env[node] for node in taken), *new]
        for node, value in zip(lifted, self.captured, strict=True):
            if identity(value) in numbers:
                env[node] = new[numbers[identity(value)]]
                continue
            found = next(
                (
                    (tensor, dim)
                    for tensor in tensors
                    if isinstance(example := tensor.meta["example_value"], torch.Tensor)
                    for dim, n in enumerate(example.shape)
                    if identity(n) == identity(value)
                ),
                None,
            )
            if found is None and node.users:
                raise LookupError(str(value))
            if found is not None and node.users:
                env[node] = size(value, *found)
        for node in self.graph.nodes:
            if node.op != "placeholder":
                env[node] = graph.node_copy(node, env.__getitem__)
        return GraphModule(dict(modules), graph)


def identity(value: object) -> object:
    """What a stand-in, or a symbolic number, is looked up by."""
    return id(value) if isinstance(value, torch.Tensor) else str(value)


def drop_decided(graph: Graph) -> None:
    """Drop what code has decided on, of which Dynamo has a guard: it may be of a size or a number from elsewhere."""
    for node in reversed(graph.nodes):
        value = node.meta.get("example_value")
        known = isinstance(value, sizes.SYMBOLIC) and not sizes.unbacked(value)
        if known and not node.users and node.op != "placeholder":
            graph.erase_node(node)


def _split(nodes: Sequence[Node], *counts: int) -> Iterator[Sequence[Node]]:
    first = 0
    for count in counts:
        yield nodes[first : first + count]
        first += count
    yield nodes[first:]
