"""Whether tensors are as they were when something was computed from them.

torch counts a version up at every write, but for those through ``tensor.data``, and for those under inference mode to
tensors that were made there. ``tensor.data = other`` counts nothing up. It shows in the address of the memory, or where
that is the same, in sizes, strides or dtype: ``TensorGuards`` is what Dynamo compares these with, in a third of the
time that it takes one by one (torch/csrc/dynamo/guards.cpp; 2.13, 2.14). If it is gone, do that. It compares dispatch
keys as well, with what the thread adds and takes away: inference mode and autocast of the tensors' device change that.
Where it does not agree it is asked again with ``_ForceDispatchKeyGuard``, which undoes them.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Container, Sequence
from typing import cast

import torch
from torch._C import _dispatch_tls_local_exclude_set, _dispatch_tls_local_include_set, _ForceDispatchKeyGuard
from torch._C._dynamo.guards import TensorGuards

from hopkit._torch.state import alone, autocasting

_PLAIN = _dispatch_tls_local_include_set(), _dispatch_tls_local_exclude_set()
"""What a thread adds and takes away where no mode is active."""

_version = operator.attrgetter("_version")
_address = torch.Tensor.data_ptr


class Seen:
    """How tensors were. It does not hold them.

    Args:
        tensors: Plain tensors, none of which was made under inference mode.
        lost: Called when one of them is gone.
        beside: Tensors that go with these, of which nobody has to be told.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        lost: Callable[[], object] = object,
        beside: Sequence[torch.Tensor] = (),
    ) -> None:
        self._alive = alive = [True]

        def gone(_: object) -> None:  # of no name here that would hold what holds this
            alive.clear()
            lost()

        self._refs = [weakref.ref(tensor, gone) for tensor in tensors]
        tensors = (*tensors, *beside)
        self._ids = [*map(id, tensors)]
        self._versions = [*map(_version, tensors)]
        self._addresses = [*map(_address, tensors)]
        self._check: Callable[..., bool] = _always  # without a tensor, torch's check crashes
        if tensors:
            with _ForceDispatchKeyGuard(*_PLAIN):
                self._check = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def holds(self, tensors: Sequence[object]) -> bool:
        """Whether these are the same tensors, and as they were; ``requires_grad`` too."""
        if not self._same(tensors):
            return False
        if self._check(*tensors):
            return True
        with _ForceDispatchKeyGuard(*_PLAIN):
            return self._check(*tensors)

    def at_rest(self, tensors: Sequence[object]) -> bool:
        """As `holds`, and no mode, tracer, transform or autocast is active: they change what is computed."""
        return alone() and not autocasting() and self._same(tensors) and self._check(*tensors)

    def _same(self, tensors: Sequence[object]) -> bool:
        return (
            [*map(id, tensors)] == self._ids
            and bool(self._alive)  # another one may be where the one that is gone was
            and [*map(_version, tensors)] == self._versions
            and [*map(_address, cast("Sequence[torch.Tensor]", tensors))] == self._addresses
        )

    def of(self, ids: Container[int]) -> bool:
        """Whether one of the tensors is among those with these ids."""
        return any(number in ids and ref() is not None for number, ref in zip(self._ids, self._refs, strict=False))


def _always() -> bool:
    return True
