"""jvp: ``rule(primals, tangents)`` on the author's arguments, or a rule on calls (`on_call`).

The jvp that asks is off while a rule on arguments runs; a rule on calls turns it off (``with level.lower():``).
"""

from __future__ import annotations

from typing import Any, Protocol

from hopkit._torch.autograd import differentiable
from hopkit._torch.levels import Tangents
from hopkit.call import Call
from hopkit.rule import on_call

__all__ = ["JvpRule", "TangentRule", "Tangents", "differentiable", "on_call"]


class TangentRule(Protocol):
    """Gives the outputs of ``call``, with their tangents; marked with `on_call`."""

    def __call__(self, level: Tangents, call: Call, /) -> object: ...


class JvpRule(Protocol):
    """``rule(primals, tangents) -> (out, out_tangents)``.

    ``primals`` has every argument, in the order of the parameters; ``tangents`` has the tangent of an operand or None,
    in its structure, and None for a subgraph and for an option. ``out_tangents`` is as ``out``; a tangent may be None,
    for zero. A call whose subgraphs close over tensors with tangents is not given to such a rule; the next in the chain
    is asked.
    """

    def __call__(self, primals: tuple[Any, ...], tangents: tuple[Any, ...], /) -> tuple[Any, Any]: ...
