"""Between a DTensor and what this process has of it, differentiable any number of times.

torch's own ``to_local`` and ``from_local`` lose a derivative without a word where a gradient has to be redistributed a
second time. Here each way is the other's derivative. Along a mesh dimension that is *split* the processes compute
different things, and what each of them contributes is added up; along all others they compute the same:

| placement              | enter: it gets | the gradient leaves as | leave: it gives | the gradient enters as          |
|------------------------|----------------|------------------------|-----------------|---------------------------------|
| ``Shard(d)``           | a slice        | ``Shard(d)``           | a slice         | ``Shard(d)``                    |
| ``Replicate()``        | the whole      | ``Replicate()``        | the whole       | ``Replicate()``                 |
| ``Replicate()``, split | the whole      | ``Partial()``          | the whole       | ``Replicate()``, an equal share |
| ``Partial()``          | a summand      | ``Replicate()``        | a summand       | ``Replicate()``                 |
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

Placements = tuple[Placement, ...]


def enter(whole: DTensor, placements: Placements, split: tuple[bool, ...]) -> torch.Tensor:
    """What this process has of ``whole`` under ``placements``."""
    local = _Enter.apply(whole, placements, split)  # type: ignore[no-untyped-call] # torch's own
    return cast("torch.Tensor", local)


def leave(
    local: torch.Tensor, mesh: DeviceMesh, placements: Placements, split: tuple[bool, ...], shape: torch.Size
) -> DTensor:
    """The DTensor of this shape of which this process has ``local``."""
    whole = _Leave.apply(local, mesh, placements, split, shape, placements)  # type: ignore[no-untyped-call] # torch's own
    return cast("DTensor", whole)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: DTensor, placements: Placements, split: tuple[bool, ...]) -> torch.Tensor:
        gradients = tuple(
            Replicate() if p.is_partial() else Partial() if p.is_replicate() and divided else p
            for p, divided in zip(placements, split, strict=True)
        )
        ctx.set_materialize_grads(False)
        ctx.told = whole.device_mesh, gradients, split, whole.shape, _reduced(whole.placements)
        mine = cast("DTensor", whole.detach()).redistribute(placements=placements).to_local()
        return mine.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[object, ...]:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None
        return _Leave.apply(gradient, *ctx.told), None, None  # type: ignore[no-untyped-call] # torch's own


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local: torch.Tensor,
        mesh: DeviceMesh,
        placements: Placements,
        split: tuple[bool, ...],
        shape: torch.Size,
        home: Placements,
    ) -> DTensor:
        shares = (mesh.size(i) for i, p in enumerate(placements) if p.is_replicate() and split[i])
        ctx.set_materialize_grads(False)
        ctx.told, ctx.shares = (_reduced(placements), split), math.prod(shares)
        return _wrapped(local.detach(), mesh, placements, shape).redistribute(placements=home)

    @staticmethod
    def backward(ctx: Any, *gradients: DTensor | None) -> tuple[object, ...]:
        (gradient,) = gradients
        if gradient is None:
            return (None,) * 6
        local = enter(gradient, *ctx.told)
        return (local / ctx.shares if ctx.shares > 1 else local, *(None,) * 5)


def _reduced(placements: Placements) -> Placements:
    """Where the gradient of something placed like this is."""
    return tuple(Replicate() if p.is_partial() else p for p in placements)


def _wrapped(local: torch.Tensor, mesh: DeviceMesh, placements: Placements, shape: torch.Size) -> DTensor:
    whole = DTensor.from_local(local, mesh, placements, run_check=False)
    if whole.shape == shape:
        return whole
    # Shards of several sizes: torch cannot tell the shape from one of them.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)
