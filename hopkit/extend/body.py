"""For bodies that take pytrees apart, decide on values or carry a state: what an op needs besides its subgraphs.

All of it means the same in every mode. `hopkit.batched` and `hopkit.anywhere` belong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

from hopkit._torch import levels
from hopkit._torch.autograd import differentiable, versions
from hopkit._torch.checkpoint import computed_again
from hopkit._torch.fakes import Stage, autograd_on
from hopkit._torch.trees import Tree, flatten, leaves, map_leaves, unflatten
from hopkit._torch.watch import Substitute
from hopkit.structured import choose, chosen, loop, own, sweep
from hopkit.transform import Replayed, leaf

__all__ = [
    "Tree",
    "choose",
    "chosen",
    "computed_again",
    "flatten",
    "is_recorded",
    "leaves",
    "loop",
    "map_leaves",
    "on_stand_ins",
    "own",
    "pull",
    "split",
    "sweep",
    "unflatten",
    "versions",
]

T = TypeVar("T")


def pull(function: Callable[[T], object], at: T, gradient: object) -> T:
    """The gradient of ``at``, where ``gradient`` is that of ``function(at)``: two pytrees of floating-point tensors.

    As ``torch.func.vjp``. It may stand in a subgraph whose captures are in a transform already.
    """
    # What a subgraph closes over is seen where an operator takes it.
    at, gradient = map_leaves(_touched, (at, gradient))
    if levels.top() is not None:
        return cast("T", torch.func.vjp(function, at)[1](gradient)[0])
    again = torch.is_grad_enabled()
    with autograd_on(), torch.enable_grad():
        point = map_leaves(lambda t: leaf(cast("torch.Tensor", t)), at)
        results = cast("list[torch.Tensor]", leaves(function(point)))
        pairs = [pair for pair in zip(results, leaves(gradient), strict=True) if pair[0].requires_grad]
        inputs, tree = flatten(point)
        found = torch.autograd.grad(
            [result for result, _ in pairs],
            cast("list[torch.Tensor]", inputs),
            [cast("torch.Tensor", g) for _, g in pairs],
            create_graph=again,
            materialize_grads=True,
        )
    return cast("T", unflatten(found, tree))


def _touched(leaf: object) -> object:
    return cast("torch.Tensor", leaf).view_as(cast("torch.Tensor", leaf))


def is_recorded(subgraph: Callable[..., object]) -> bool:
    """Whether what a body got for a subgraph is a graph, for which all was checked when it was recorded."""
    return isinstance(subgraph, Replayed)


def on_stand_ins(function: Callable[[], T]) -> T:
    """``function()`` with stand-ins in place of tensors from outside: shapes; nothing is computed, written or drawn.

    Raises:
        Exception: What ``function`` raises, which may need values.
    """
    stage = Stage([])
    with stage.open(), Substitute(stage.stand_in) as mode:
        return mode.replaced(function())


def split(value: T) -> tuple[list[torch.Tensor], Callable[..., T]]:
    """The tensors of a pytree that have derivatives, and ``fill(tensors)``, the pytree with others in their place.

    ``fill(tensors, None)`` has None in place of all other leaves.
    """
    given, tree = flatten(value)
    found = {i: cast("torch.Tensor", leaf) for i, leaf in enumerate(given) if differentiable(leaf)}

    def fill(tensors: Sequence[torch.Tensor], rest: object = _SAME) -> T:
        new = dict(zip(found, tensors, strict=True))
        return cast("T", unflatten([new.get(i, leaf if rest is _SAME else rest) for i, leaf in enumerate(given)], tree))

    return list(found.values()), fill


_SAME = object()
