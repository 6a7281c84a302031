"""``region``: one node, and its body in every mode."""

from __future__ import annotations

import torch
from hopkit_controlflow import region
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit.testing import check


def test_it_is_right_in_every_mode() -> None:
    report = check(region)
    assert report.ok, str(report)


def test_recorded_it_is_one_node() -> None:
    x = torch.linspace(-1, 1, 6)
    graph = make_fx(lambda x: region(torch.sin, (x,)))(x)
    assert len(graph.graph.find_nodes(op="call_function", target=region.operator)) == 1
    assert torch.equal(graph(x), torch.sin(x))
