"""What a fold did, and what it left in place."""

from __future__ import annotations

import dataclasses

from hopkit.extend import table


@dataclasses.dataclass(frozen=True)
class Constant:
    """One value that is computed once.

    Args:
        node: The node that gave it.
        weights: The fully qualified names of what it is computed from.
        nodes: How many nodes of the graph compute it.
        taken: The bytes of these weights.
        given: The bytes of the value.
    """

    node: str
    weights: tuple[str, ...]
    nodes: int
    taken: int
    given: int


@dataclasses.dataclass(frozen=True)
class Left:
    """A node that depends on weights alone, and stays.

    Args:
        node: The node.
        reason: Why.
    """

    node: str
    reason: str


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What a fold did; prints as a table.

    Args:
        constants: The values that are computed once.
        left: What depends on weights alone, and stays.
        moved: How many nodes were moved into the constant graph.
        taken: The bytes of the weights that the constants are computed from.
        released: The names of the weights that are gone, and whose constants are final.
    """

    constants: tuple[Constant, ...]
    left: tuple[Left, ...]
    moved: int
    taken: int
    released: tuple[str, ...] = ()

    @property
    def given(self) -> int:
        """The bytes of all constants."""
        return sum(constant.given for constant in self.constants)

    def summary(self) -> str:
        """The figures in one line."""
        if not self.constants:
            return "nothing is computed from weights alone, or all of it is left in place; the model is as it was"
        return (
            f"{self.moved} nodes moved, which give {len(self.constants)} constants: {_bytes(self.given)} from "
            f"{_bytes(self.taken)} of weights; {len(self.left)} nodes left"
            + (f"; {len(self.released)} weights released" if self.released else "")
        )

    def __str__(self) -> str:
        rows = [
            (c.node, "folded", str(c.nodes), _bytes(c.taken), _bytes(c.given), _names(c.weights))
            for c in self.constants
        ]
        rows += [(left.node, "left", "", "", "", left.reason) for left in self.left]
        return f"{table(HEADER, rows)}\n\n{self.summary()}" if rows else self.summary()

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {**dataclasses.asdict(self), "given": self.given}


HEADER = ("node", "", "nodes", "weights", "constant", "computed from, or why it is left")

_SHOWN = 3


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
