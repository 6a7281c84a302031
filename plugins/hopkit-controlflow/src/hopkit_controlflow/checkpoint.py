"""``checkpoint``: a region that is computed again in backward."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch

import hopkit
from hopkit.extend.body import computed_again

T = TypeVar("T")
A = TypeVar("A")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_checkpoint`` makes."""
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    weight = torch.linspace(0.5, 1.5, 9).reshape(3, 3).requires_grad_()
    return [
        hopkit.Sample((lambda x: x.sin().exp().cos(), x)),
        hopkit.Sample((lambda x: torch.tanh(torch.tanh(x @ weight) @ weight), x), name="capture"),
        hopkit.Sample((torch.nn.functional.dropout, x, 0.5), name="random"),
        hopkit.Sample(
            (lambda t, n: {"a": t["x"].sin() * n, "b": (t["y"][0].exp(),)}, {"x": x, "y": [x + 1]}, 2), name="tree"
        ),
    ]


@hopkit.define("controlflow_checkpoint", samples=samples)
def checkpoint(
    function: hopkit.Subgraph[T],
    *args: A,
    use_reentrant: Literal[False] = False,
    preserve_rng_state: Literal[True] = True,
) -> T:
    """``function(*args)``, of which only ``args`` and the result are kept for backward: it is computed again there.

    As ``torch.utils.checkpoint.checkpoint``, with the same random numbers the second time. Compiled, torch's
    partitioner is told to compute it again. Under a transform of torch.func, and in forward mode, it is an ordinary
    call.

    Args:
        function: May close over tensors, which have gradients.
        args: Pytrees of tensors and numbers.
        use_reentrant: torch's other kind is not there.
        preserve_rng_state: Nor is another draw in backward.
    """
    return computed_again(function, *args)
