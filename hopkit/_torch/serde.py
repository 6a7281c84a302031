"""torch.export's reader of saved programs, and what looks at a program before it is read.

What is wrong with a node is said here: further in, torch catches every error, logs it, and raises one of its own that
names nothing. (torch/_export/serde/serialize.py, seen in 2.13 and 2.14. If it is gone, programs load as before, and
torch words what is wrong with one.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from hopkit._torch.later import after_import

if TYPE_CHECKING:
    from torch._export.serde.schema import ExportedProgram as Program
    from torch._export.serde.schema import Graph
    from torch._export.serde.serialize import ExportedProgramDeserializer

_MODULE = "torch._export.serde.serialize"
_PREFIX = "torch.ops.higher_order."


@dataclasses.dataclass(frozen=True)
class SavedNode:
    """The node of a higher-order operator in a saved program.

    Args:
        op: The operator's name.
        keywords: Its keywords; a value that is no text is None.
    """

    op: str
    keywords: dict[str, str | None]


def watch(check: Callable[[SavedNode], None]) -> None:
    """Let ``check`` see every node before a saved program is read. What it raises is what loading raises."""
    after_import(_MODULE, functools.partial(_watch, check=check))


def _watch(module: ModuleType, check: Callable[[SavedNode], None]) -> None:
    reader: type[ExportedProgramDeserializer] = module.ExportedProgramDeserializer
    deserialize = reader.deserialize

    @functools.wraps(deserialize)
    def checked(self: ExportedProgramDeserializer, program: Program, *args: object, **kwargs: object) -> object:
        for node in _nodes(program.graph_module.graph):
            check(node)
        return deserialize(self, program, *args, **kwargs)  # type: ignore[arg-type] # torch's own

    reader.deserialize = checked  # type: ignore[method-assign, assignment]


def _nodes(graph: Graph) -> Iterator[SavedNode]:
    for node in graph.nodes:
        graphs = [item.arg.as_graph.graph for item in node.inputs if item.arg.type == "as_graph"]
        if node.target.startswith(_PREFIX):
            name = node.target.removeprefix(_PREFIX)
            keywords = {
                item.name: item.arg.as_string if item.arg.type == "as_string" else None
                for item in node.inputs
                if item.name
            }
            yield SavedNode(name, keywords)
        for inner in graphs:
            yield from _nodes(inner)
