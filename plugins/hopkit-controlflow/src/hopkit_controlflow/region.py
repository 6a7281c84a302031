"""``region``: a part of a program that stays one node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

import hopkit

T = TypeVar("T")

Hint = bool | int | float | str | None


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_region`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    weight = torch.linspace(0.5, 1.5, 9).reshape(3, 3).requires_grad_()
    return [
        hopkit.Sample((torch.sin, (x,))),
        hopkit.Sample((torch.add, (x, x + 1), {"alpha": 2}), name="two operands"),
        hopkit.Sample((lambda x: x @ weight, (x,)), {"hints": (("stage", 1), ("name", "mlp"))}, name="capture, hints"),
        hopkit.Sample(
            (lambda t, n: {"a": t["x"] * n, "b": (t["y"][0].sum(),)}, ({"x": x, "y": [x + 1]}, 2)), name="tree"
        ),
    ]


@hopkit.define("controlflow_region", outline=True, samples=samples)
def region(
    body: hopkit.Subgraph[T],
    operands: tuple[object, ...] = (),
    keywords: Mapping[str, object] | None = None,
    *,
    hints: tuple[tuple[str, Hint], ...] = (),  # for who reads the node
) -> T:
    """``body(*operands, **keywords)``, kept as one node of a recorded graph.

    The counterpart of ``torch._higher_order_ops.invoke_subgraph`` and ``hints_wrapper``. Under Inductor the code of
    equal calls is written once.

    Args:
        body: Any function of pytrees of tensors and numbers.
        operands: Its positional arguments, a tuple or list.
        keywords: Its keyword arguments.
        hints: What a backend wants to be told, as ``(name, value)`` pairs: a constant of the node.
    """
    return body(*operands, **(keywords or {}))
