"""Tensors in a call and in its result: which there are, and others like them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hopkit._torch import trees

Tensors = Sequence[torch.Tensor]


def tensors_in(value: object) -> list[torch.Tensor]:
    """The tensors among a pytree's leaves."""
    return trees.tensors(value)


def floats_in(value: object) -> list[torch.Tensor]:
    """Those that are `differentiable`."""
    return [leaf for leaf in tensors_in(value) if differentiable(leaf)]


def differentiable(value: object) -> bool:
    """Whether this is a tensor of a dtype that has gradients."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def detached(value: object) -> object:
    """A pytree whose tensors are cut off from autograd."""
    return trees.map_only(torch.Tensor, lambda t: t.detach(), value)


def smaller(tensor: torch.Tensor) -> torch.Tensor:
    """Other values that are as good: a positive number stays one, an index stays in its range."""
    if differentiable(tensor):
        return (tensor.detach() * 0.875).requires_grad_(tensor.requires_grad)
    return tensor.flip(tuple(range(tensor.dim()))) if tensor.layout is torch.strided else tensor


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Values on the other side of zero, where a body may decide otherwise."""
    if differentiable(tensor):
        return (-tensor.detach()).requires_grad_(tensor.requires_grad)
    return ~tensor if tensor.dtype is torch.bool else tensor


def grown(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """One element more, a copy of the first, along every dimension of this size."""
    result = tensor.detach()
    for dim in [d for d, n in enumerate(tensor.shape) if n == size]:
        result = torch.cat([result, result.narrow(dim, 0, 1)], dim)
    return result.requires_grad_(tensor.requires_grad)
