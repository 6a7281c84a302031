"""Whether tensors are as they were when something was computed from them.

torch counts a version up at every write, but for those through ``tensor.data``, and for those under inference mode to
tensors that were made there. ``tensor.data = other`` counts nothing up. It shows in the address of the memory, or where
that is the same, in sizes, strides or dtype: ``TensorGuards`` is what Dynamo compares these with, in a third of the
time that it takes one by one (torch/csrc/dynamo/guards.cpp; 2.13, 2.14). If it is gone, do that. It compares dispatch
keys as well, with what the thread adds and takes away: inference mode and autocast of the tensors' device change that.
Where it does not agree it is asked again with ``_ForceDispatchKeyGuard``, which undoes them.

Many tensors are looked at in C++ (seen.cpp) once that is built (native.py), in a tenth of the time, and a fifth where
the caches are cold.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Container, Sequence
from typing import cast

import torch
from torch._C import _dispatch_tls_local_exclude_set as _excluded
from torch._C import _dispatch_tls_local_include_set as _included
from torch._C import _ForceDispatchKeyGuard
from torch._C._dynamo.guards import TensorGuards

from hopkit._torch.native import Native
from hopkit._torch.state import alone

_PLAIN = _included(), _excluded()
"""What a thread adds and takes away where no mode is active."""

MANY = 100
"""From so many tensors on a look in Python takes longer than 30 us, and C++ is asked for."""

NATIVE = Native("seen")

Look = Callable[[tuple[object, ...]], bool]

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
        self._ids = [*map(id, tensors)]
        tensors = (*tensors, *beside)
        if len(tensors) >= MANY:
            NATIVE.ask()
        found = _native(tensors)
        self._waits = found is None and len(tensors) >= MANY
        self._look: Look = found or _InPython(tensors)

    def holds(self, tensors: Sequence[object]) -> bool:
        """Whether these are the same tensors, and as they were; ``requires_grad`` too."""
        given = tuple(tensors)
        if not (self._alive and self._look(given)):  # another one may be where the one that is gone was
            return False
        if self._waits and NATIVE.module is not None:
            self._waits, found = False, _native(cast("tuple[torch.Tensor, ...]", given))
            if found is not None and self._look(given):  # nothing was written before it looked
                self._look = found
        return True

    def at_rest(self, tensors: Sequence[object]) -> bool:
        """As `holds`, and no mode, tracer, transform or autocast is active: they change what is computed."""
        return (_included(), _excluded()) == _PLAIN and alone() and self.holds(tensors)

    def of(self, ids: Container[int]) -> bool:
        """Whether one of the tensors is among those with these ids."""
        return any(number in ids and ref() is not None for number, ref in zip(self._ids, self._refs, strict=True))


def _native(tensors: tuple[torch.Tensor, ...]) -> Look | None:
    """The look in C++, where there is one."""
    try:
        return None if NATIVE.module is None else cast("Look", NATIVE.module.seen(tensors))
    except (TypeError, RuntimeError):  # subclasses, or the tensors of another torch
        return None


class _InPython:
    """The look in Python."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._ids = [*map(id, tensors)]
        self._versions = [*map(_version, tensors)]
        self._addresses = [*map(_address, tensors)]
        self._check: Callable[..., bool] = _always  # without a tensor, torch's check crashes
        if tensors:
            with _ForceDispatchKeyGuard(*_PLAIN):
                self._check = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def __call__(self, tensors: tuple[object, ...]) -> bool:
        if not (
            [*map(id, tensors)] == self._ids
            and [*map(_version, tensors)] == self._versions
            and [*map(_address, cast("Sequence[torch.Tensor]", tensors))] == self._addresses
        ):
            return False
        if self._check(*tensors):
            return True
        with _ForceDispatchKeyGuard(*_PLAIN):
            return self._check(*tensors)


def _always() -> bool:
    return True
