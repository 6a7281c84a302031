"""functionalize: ``rule(layer, call)``. Functionalization is still active while the rule runs; `Functionalizer`'s
``redispatch_to_next()`` turns it off."""

from __future__ import annotations

from typing import Protocol

import torch

from hopkit._torch import functional
from hopkit._torch.functional import Functionalizer, active, assign, assignable
from hopkit.call import Call, GraphLike, Pure

__all__ = [
    "FunctionalizeRule",
    "Functionalizer",
    "active",
    "assign",
    "assignable",
    "automatic",
    "pure",
]


class FunctionalizeRule(Protocol):
    """Gives the outputs of ``call``, wrapped by ``layer``."""

    def __call__(self, layer: Functionalizer, call: Call, /) -> object: ...


def pure(layer: Functionalizer, graph: GraphLike) -> GraphLike:
    """``graph`` without mutation, but for what it leaves in its inputs: that is copied there in the end."""
    return Pure(functional.functionalized(layer, graph), graph)


def automatic(layer: Functionalizer, call: Call) -> object:
    """The outputs of a call that writes to inputs, as torch makes any such operator functional: its own node holds it.

    None: torch has that for AOTAutograd's graphs alone, and not for those that are exported.
    """
    if torch.compiler.is_exporting():  # torch.export takes its node for operators only
        return None
    return functional.automatic(
        layer, call.target, call.schema(call.written), (*call.graphs, *call.inputs), call.keywords
    )
