"""inductor: ``rule(call)``, called where Inductor lowers a node. The call's graphs and inputs are Inductor's own."""

from __future__ import annotations

from typing import Protocol

from hopkit._torch.inductor import inlined, lowered, packaging, untouched
from hopkit.call import Call

__all__ = ["InductorRule", "inline", "lowered", "packaging", "untouched"]


class InductorRule(Protocol):
    """Gives the outputs of ``call`` in Inductor's terms.

    An op has its node only where a plugin or the author has such a rule: without one, the body is what Inductor gets.
    """

    def __call__(self, call: Call, /) -> object: ...


def inline(call: Call) -> object:
    """The body's own code, which fuses with what stands before and after it."""
    graphs = [getattr(graph, "graph_module", graph) for graph in call.graphs]
    plain = call.replace(graphs=graphs)
    return inlined(lambda inputs: plain.replace(inputs=inputs).run(), call.op.name, call.inputs)
