"""autograd: ``rule(call)``, or a pair of functions on the author's arguments (`Vjp`). Autograd is active while
the rule runs; `below_autograd` turns it off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from typing_extensions import ParamSpec

from hopkit._torch.autograd import (
    Step,
    apart,
    apply,
    below_autograd,
    differentiable,
    dual,
    every_level,
    needs_gradient,
    raise_in_backward,
    versions,
)
from hopkit._torch.checkpoint import uncounted
from hopkit._torch.library import raises_when_run
from hopkit._torch.partition import OutsideError
from hopkit._torch.random import repeatable
from hopkit._torch.state import foreseeing, recording_ahead
from hopkit._torch.structured import Unstructured, compiling
from hopkit.call import Call
from hopkit.errors import no_gradient
from hopkit.region import Halves

__all__ = [
    "AutogradRule",
    "Halves",
    "OutsideError",
    "Step",
    "Unstructured",
    "Vjp",
    "apart",
    "apply",
    "below_autograd",
    "compiling",
    "differentiable",
    "dual",
    "every_level",
    "foreseeing",
    "needs_gradient",
    "no_gradient",
    "raise_in_backward",
    "raises_when_run",
    "recording_ahead",
    "repeatable",
    "uncounted",
    "versions",
]

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class AutogradRule(Protocol):
    """Gives the outputs of ``call``, on the autograd tape."""

    def __call__(self, call: Call, /) -> object: ...


class Vjp(Protocol[P, R]):
    """A derivative written by hand: a class with two static methods, or any object with two such functions.

    ``forward`` has the body's parameters and gives ``(out, saved)``, where ``saved`` is any pytree. ``backward`` takes
    ``saved`` and the gradient (or None) of every tensor in ``out``. It gives one gradient per operand tensor, in order;
    then, if any is asked for, one per captured tensor: a subgraph among the arguments has them as ``captures``.
    """

    def forward(self, *args: P.args, **kwargs: P.kwargs) -> tuple[R, object]:
        """``forward(*args, **kwargs) -> (out, saved)``."""

    def backward(self, *args: Any, **kwargs: Any) -> Sequence[torch.Tensor | None]:
        """``backward(saved, *gradients) -> gradients``."""
