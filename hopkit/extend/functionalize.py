"""functionalize: ``rule(layer, call)``. Functionalization is still active while the rule runs; `Functionalizer`'s
``redispatch_to_next()`` turns it off."""

from __future__ import annotations

from typing import Protocol

from hopkit._torch.functional import Functionalizer
from hopkit.call import Call, GraphLike, Pure

__all__ = ["FunctionalizeRule", "Functionalizer", "pure"]


class FunctionalizeRule(Protocol):
    """Gives the outputs of ``call``, wrapped by ``layer``."""

    def __call__(self, layer: Functionalizer, call: Call, /) -> object: ...


def pure(layer: Functionalizer, graph: GraphLike) -> GraphLike:
    """``graph`` without mutation."""
    return Pure(layer.functionalize(graph), graph)
