"""An operator that vanishes: what Dynamo has in its place is what a module computes before compiled code runs."""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch._ops import HigherOrderOperator

from hopkit._torch.dynamo import register, skip

if TYPE_CHECKING:
    from hopkit._torch.frame import Frame, Variable


class Ahead(Protocol):
    """A module that computes some tensors itself, for code that is compiled."""

    def _ahead(self) -> tuple[torch.Tensor, ...] | None:
        """These tensors, as they are now without gradients and without autocast. None: they are to be had otherwise."""

    def _look_ahead(self) -> tuple[torch.Tensor, ...] | None:
        """The same, for guards, which may ask at any time."""

    def _ahead_of(self) -> Iterable[torch.Tensor]:
        """What they are computed from: weights of the module."""


class _Operator(HigherOrderOperator):
    """``ahead(module)``, which gives tensors, or None."""

    def __init__(self) -> None:
        super().__init__("hopkit_ahead")  # type: ignore[no-untyped-call] # torch's own

    def __call__(self, module: Ahead, /) -> tuple[torch.Tensor, ...] | None:
        """The tensors."""
        return module._ahead()

    def read(self, frame: Frame) -> Variable:
        """What Dynamo has in its place."""
        (given,) = frame.args
        module = cast("Ahead", frame.callee(given))
        for method in (type(module)._ahead, type(module)._look_ahead):  # Dynamo would read what compiled code calls
            skip(cast("FunctionType", method))
        return frame.taken(given, "_look_ahead", "_ahead", module._ahead_of)


AHEAD = _Operator()
register("hopkit_ahead")
