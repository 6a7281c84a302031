"""Which constants of a graph are computed once: those that the policy has nothing against."""

from __future__ import annotations

import torch
from torch.fx import Node

from hopkit_constgraph.constants import Constants, ancestors, shares, values
from hopkit_constgraph.policy import Policy


def choose(found: Constants, policy: Policy) -> tuple[list[Node], dict[Node, str]]:
    """The constants that are computed once, in the order of the graph; and what is left, and why.

    Where one is left, what it is computed from may be computed once still.
    """
    left, chosen, total = dict(found.left), [], 0
    wanted = {node for node in found.computed if any(user not in found.computed for user in node.users)}
    for node in sorted(found.computed, reverse=True):
        if node not in wanted or not (weights := [n for n in ancestors([node]) if n in found.sources]):
            continue
        # A view costs nothing, and holds on to what it is a view of.
        passed = shares(node) or not isinstance(node.meta["val"], torch.Tensor)
        reason = "" if passed else _refusal(node, weights, policy, total)
        if passed or reason:
            wanted.update(node.all_input_nodes)
        else:
            chosen.append(node)
            total += size(node)
        if reason:
            left[node] = reason
    return chosen[::-1], left


def size(node: Node) -> int:
    """How many bytes the tensors take that a node gives."""
    return sum(value.numel() * value.element_size() for value in values(node))


def _refusal(node: Node, weights: list[Node], policy: Policy, total: int) -> str:
    given, taken = size(node), sum(map(size, weights))
    if policy.skip is not None and policy.skip(node):
        return "the policy skips it"
    if given > policy.small and given > policy.growth * taken:
        return f"it takes {given / taken:.1f} times the memory of its weights, and Policy(growth={policy.growth:g})"
    if policy.most is not None and total + given > policy.most:
        return f"with it, all constants take more than Policy(most={policy.most})"
    return ""
