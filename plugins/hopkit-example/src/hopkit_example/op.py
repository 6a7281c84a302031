"""An op of the plugin's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import hopkit
from hopkit.extend import hookimpl


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check example_repeat`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    return [hopkit.Sample((torch.sin, x)), hopkit.Sample((torch.tanh, x), {"times": 5}, name="five times")]


@hopkit.define("example_repeat", samples=samples)
def repeat(body: hopkit.Subgraph, x: torch.Tensor, *, times: int = 2) -> torch.Tensor:
    """Apply ``body`` to ``x``, then to the result, and so on."""
    for _ in range(times):
        x = body(x)
    return x


@hookimpl
def hopkit_add_ops() -> Iterable[hopkit.Op[..., object]]:
    """Makes the op known as this plugin's."""
    return [repeat]
