"""``region``: one node, and its body in every mode."""

from __future__ import annotations

import torch
from hopkit_controlflow import region
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

X = torch.linspace(-1, 1, 9).reshape(3, 3)


def test_recorded_it_is_one_node_that_has_its_hints() -> None:
    graph = make_fx(lambda x: region(torch.add, (x, x), {"alpha": 2}, hints=(("stage", 3),)))(X)
    (node,) = graph.graph.find_nodes(op="call_function", target=region.operator)
    assert "stage" in node.kwargs["hopkit"]
    assert torch.equal(graph(X), 3 * X)


def test_as_torch_has_it() -> None:
    weight = X.clone().requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return torch.tanh(x @ weight)

    theirs = torch.compile(torch.compiler.nested_compile_region(layer), backend="aot_eager", fullgraph=True)
    ours = torch.compile(lambda x: region(layer, (x,)), backend="aot_eager", fullgraph=True)
    for function in (theirs, ours):
        (gradient,) = torch.autograd.grad(function(X).sum(), weight)
        torch.testing.assert_close(gradient, torch.autograd.grad(layer(X).sum(), weight)[0])
