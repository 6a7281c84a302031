"""Products that a step computes and its derivative needs: the step gives them, and they are not computed again.

What is cheap is computed again, fused with what needs it; a product of matrices is not, and costs more than reading it.
torch's partitioner draws the same line (``compute_intensive_ops`` in torch/_functorch/partitioners.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterator, Sequence
from typing import cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from hopkit._torch.autograd import differentiable
from hopkit._torch.constant import AS_DETACHED
from hopkit._torch.structured import Flat, Unstructured, trace

aten = torch.ops.aten

_PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.addmv.default,
    aten.convolution.default,
)


class Products:
    """The products of a step that its derivative needs, in the order in which the step gives them."""

    def __init__(self) -> None:
        self._table: dict[object, int] = {}
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._order)

    def keep(self, step: GraphModule, pull: Callable[[Sequence[int]], Flat], *, idle: int, others: int) -> None:
        """Let ``step`` give the products, too, after what it gives.

        Args:
            step: A graph.
            pull: The derivative, for gradients of these outputs.
            idle: How many inputs and outputs, the first ones, the derivative does not know.
            others: How many outputs, the last ones, it does not know.
        """
        (output,), inputs = step.graph.find_nodes(op="output"), step.graph.find_nodes(op="placeholder")
        given = {i: node.meta["val"] for i, node in enumerate(output.args[0][idle : len(output.args[0]) - others])}
        slopes = {i: value for i, value in given.items() if differentiable(value)}
        try:
            graph = trace(pull([*slopes]), [*(node.meta["val"] for node in inputs[idle:]), *slopes.values()])
        except Unstructured:  # backward may need a part of it only
            return
        roles = range(len(inputs) - idle)
        numbers, needed = self._numbers(step, [*[None] * idle, *roles]), self._numbers(graph, roles)
        products = {numbers[node]: node for node in numbers if _is_product(node)}
        self._order = [*dict.fromkeys(needed[node] for node in _reached(graph, needed, products))]
        with step.graph.inserting_before(output):
            # A copy, which is fused with writing it among the others: the step may give the product itself, too.
            copies = [step.graph.call_function(aten.clone.default, (products[number],)) for number in self._order]
        output.args = ((*output.args[0], *copies),)
        step.recompile()

    def spare(self, back: GraphModule, roles: Sequence[int | None], at: int) -> list[int]:
        """Let ``back`` take products in place of computing them; gives which.

        Args:
            back: A graph that computes the derivative.
            roles: Of each of its inputs, which input of the step it is.
            at: Which inputs the products become: this one, and those after it.
        """
        numbers = self._numbers(back, roles)
        last = back.graph.find_nodes(op="placeholder")[at - 1]
        taken: dict[int, Node] = {}
        for node in [*_reached(back, numbers, self._order)]:
            if numbers[node] not in taken:
                with back.graph.inserting_after(last):
                    last = taken[numbers[node]] = back.graph.placeholder(f"product_{numbers[node]}")
                last.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(taken[numbers[node]])
        back.graph.eliminate_dead_code()
        back.recompile()
        return [self._order.index(number) for number in taken]

    def _numbers(self, module: GraphModule, roles: Sequence[int | None]) -> dict[Node, int]:
        """A number for each value: the same for what any graph computes by the same operators of the same inputs."""
        if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in module.graph.nodes):
            return {}  # how a value was computed does not tell what was written to it since
        inputs, numbers = iter(roles), dict[Node, int]()
        for node in module.graph.nodes:
            key: object = node  # equal to nothing else
            if node.op == "placeholder":
                role = next(inputs, None)
                key = node if role is None else role
            elif node.target in AS_DETACHED:
                numbers[node] = numbers[cast("Node", node.args[0])]
                continue
            elif isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
                key = node.target, repr(map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}"))
            numbers[node] = self._table.setdefault(key, len(self._table))
        return numbers


def _is_product(node: Node) -> bool:
    # Of another layout the derivative would make other views.
    return node.target in _PRODUCTS and cast("torch.Tensor", node.meta["val"]).is_contiguous()


def _reached(module: GraphModule, numbers: dict[Node, int], wanted: Container[int]) -> Iterator[Node]:
    """The nodes of these numbers that what the graph gives depends on, but for those that only others of them need."""
    pending, seen = list(module.graph.find_nodes(op="output")), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if numbers.get(node) in wanted:
            yield node
        else:
            pending.extend(node.all_input_nodes)
