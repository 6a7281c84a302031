"""device: a rule has the body's own signature. No mode, and no autograd, is active while it runs."""

from __future__ import annotations

from typing import Protocol, TypeVar

from typing_extensions import ParamSpec

from hopkit._torch.seen import Seen
from hopkit._torch.state import alone

__all__ = ["DeviceRule", "Seen", "alone"]

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class DeviceRule(Protocol[P, R]):
    """Computes the op's result, on one device type or on all."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
