"""What is looked at before torch reads a saved program: whether its ops are here, and take its nodes."""

from __future__ import annotations

from collections.abc import Mapping

from hopkit import layout, transform
from hopkit._torch import namespace
from hopkit._torch.serde import SavedNode
from hopkit.errors import LayoutError, UnknownOpError
from hopkit.layout import Layout
from hopkit.origin import how_to_get
from hopkit.spec import OpSpec


def check(node: SavedNode, ops: Mapping[str, OpSpec]) -> None:
    """Check that a node can run here.

    Raises:
        UnknownOpError: No plugin that is installed, and nothing that was imported, defines its op.
        LayoutError: It is damaged, was written by another hopkit, or its op takes other parameters now.
    """
    text = node.keywords.get(layout.KEYWORD)
    if not namespace.has(node.op):
        raise UnknownOpError(
            f"op '{node.op}' of the saved program",
            "is not defined here",
            why="a program keeps an op's name and its graphs, and not its body",
            todo=how_to_get(layout.origin(text or "")),
        )
    if text is not None:
        known = _read(node.op, text)
        if not known.region and node.op in ops:
            transform.check_parameters(ops[node.op], known, node.keywords.keys() - {layout.KEYWORD})


def _read(op: str, text: str) -> Layout:
    try:
        return layout.loads(text)
    except LayoutError as error:
        found = f"has a layout that {error.found}"
        raise LayoutError(f"a node of op '{op}'", found, why=error.why, todo=error.todo) from error
