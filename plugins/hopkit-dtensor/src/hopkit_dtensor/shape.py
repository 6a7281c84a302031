"""The shape of a DTensor, from what the processes have of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hopkit_dtensor.local import Placements


def if_even(local: torch.Tensor, mesh: DeviceMesh, placements: Placements) -> torch.Size:
    """The shape of the whole, if every process has as much of it as this one."""
    shape = list(local.shape)
    for i, placement in enumerate(placements):
        if isinstance(placement, Shard):
            shape[placement.dim] *= mesh.size(i)
    return torch.Size(shape)


def if_uneven(local: torch.Tensor, mesh: DeviceMesh, placements: Placements) -> torch.Size | None:
    """The shape of the whole, after asking every process. None: what they have are no shards of anything.

    The answer is the same on every process, so that they raise together.
    """
    mine = torch.tensor(local.shape, device=local.device).reshape([1] * mesh.ndim + [local.ndim])
    everyone = DTensor.from_local(mine, mesh, [Shard(i) for i in range(mesh.ndim)], run_check=False).full_tensor()
    shape = []
    for dim in range(local.ndim):
        sharded = [i for i, p in enumerate(placements) if isinstance(p, Shard) and p.dim == dim]
        row = everyone[tuple(slice(None) if i in sharded else 0 for i in range(mesh.ndim))]
        shape.append(int(row[..., dim].sum()))
    whole = torch.Size(shape)
    for coordinate in itertools.product(*(range(mesh.size(i)) for i in range(mesh.ndim))):
        if everyone[coordinate].tolist() != _shard(whole, mesh, placements, coordinate):
            return None
    return whole


def _shard(shape: Sequence[int], mesh: DeviceMesh, placements: Placements, coordinate: Sequence[int]) -> list[int]:
    """The shape of the shard that the process at this coordinate has: DTensor shards as ``torch.chunk`` does."""
    found = list(shape)
    for i, placement in enumerate(placements):
        if isinstance(placement, Shard):
            size = found[placement.dim]
            most = -(-size // mesh.size(i))
            found[placement.dim] = max(0, min(most, size - most * coordinate[i]))
    return found
