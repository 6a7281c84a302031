"""Batch norms in evaluation, written into the weights of the convolutions before them.

``norm(conv(x, W) + b)`` is ``conv(x, W * s) + (b - mean) * s + beta`` with ``s = gamma / sqrt(var + eps)``: what is
left of the norm depends on weights alone. torch/nn/utils/fusion.py does the same to modules. Rounding differs a little.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

_aten = torch.ops.aten
_NORM = _aten.batch_norm.default
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)


def absorb(graph: Graph, weights: Container[Node]) -> None:
    """Take every batch norm out of ``graph`` that follows a convolution and nothing else does, in place."""
    for norm in graph.find_nodes(op="call_function", target=_NORM):
        given, gamma, beta, mean, var, training, _, eps, _ = norm.args
        (weight, bias) = (*given.args[1:3], None)[:2] if given.target in _CONVOLUTIONS else (None, None)
        used = (weight, bias, gamma, beta, mean, var)
        alone = weight is not None and len(given.users) == 1
        if not alone or training or not all(n is None or n in weights for n in used) or mean is None or var is None:
            continue
        with graph.inserting_before(given):
            write = _Writer(graph)
            scale = write(_aten.rsqrt.default, write(_aten.add.Tensor, var, eps))
            scale = scale if gamma is None else write(_aten.mul.Tensor, scale, gamma)
            wide = [-1] + [1] * (cast("torch.Tensor", weight.meta["val"]).dim() - 1)
            scaled = write(_aten.mul.Tensor, weight, write(_aten.reshape.default, scale, wide))
            moved = write(_aten.neg.default, mean) if bias is None else write(_aten.sub.Tensor, bias, mean)
            shift = write(_aten.mul.Tensor, moved, scale)
            shift = shift if beta is None else write(_aten.add.Tensor, shift, beta)
        given.args = (given.args[0], scaled, shift, *given.args[3:])
        norm.replace_all_uses_with(given)
        graph.erase_node(norm)
        given.name = norm.name  # a program knows its outputs by their names


class _Writer:
    """Writes nodes that say what they give."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __call__(self, target: Callable[..., object], *args: object) -> Node:
        node = self._graph.call_function(target, cast("tuple[Argument, ...]", args))
        node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
        return node
