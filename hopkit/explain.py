"""Who answers for an op, mode by mode, and who was asked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from hopkit import kit
from hopkit.errors import UnknownOpError
from hopkit.manager import Plugins
from hopkit.modes import Mode
from hopkit.op import AnyOp
from hopkit.resolve import Contested
from hopkit.rule import Answer, Place, source
from hopkit.spec import OpSpec
from hopkit.table import table

Kind = Literal["derived", "hand-written", "decomposing", "refusing", "missing", "conflict"]


@dataclasses.dataclass(frozen=True)
class Row:
    """How an op behaves in one mode.

    Args:
        mode: The mode.
        kind: "derived" (from the body), "hand-written", "decomposing" (the body runs in the mode, and the op
            vanishes), "refusing" (says why not), "missing", or "conflict" (several plugins claim it: a call raises).
        plugin: Whose rule it is; "author" for a rule that is attached to the op.
        where: ``file:line`` of the rule.
        asked: Every plugin that was asked, in the order in which torch would hear them.
        note: What else is to be known.
    """

    mode: str
    kind: Kind
    plugin: str
    where: str
    asked: tuple[str, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How an op behaves in every mode; prints as a table.

    Args:
        op: torch's name of the op.
        function: The author's name for it, with its module.
        where: ``file:line`` of the body.
        signature: What the op takes.
        rows: One for every mode, and one more for every device type that has a rule of its own.
    """

    op: str
    function: str
    where: str
    signature: str
    rows: tuple[Row, ...]

    def cells(self) -> list[tuple[str, ...]]:
        """The table's cells, below `HEADER`."""
        return [(r.mode, r.kind, r.plugin, _short(r.where), ", ".join(r.asked), r.note) for r in self.rows]

    def title(self) -> str:
        """The op, and where its body is."""
        return f"{self.op}{self.signature}\n{self.function}, {_short(self.where)}"

    def __str__(self) -> str:
        return f"{self.title()}\n\n{table(HEADER, self.cells())}"

    def as_json(self) -> dict[str, object]:
        """The explanation as plain data."""
        return dataclasses.asdict(self)


HEADER = ("mode", "answer", "by", "where", "asked", "note")


def explain(op: AnyOp | str) -> Explanation:
    """How an op behaves in every mode, whose rule it is, and who was asked.

    Args:
        op: The op, torch's name for it, or the author's, with or without the package.

    Raises:
        UnknownOpError: There is no such op.
    """
    found = find(op) if isinstance(op, str) else op
    host, spec = kit.current(), found.spec
    host.load()
    rows = tuple(row for mode in host.plugins.modes for row in _rows(found, mode, host.plugins))
    return Explanation(spec.name, function_name(spec), source(spec.body), spec.shown(), rows)


def find(name: str) -> AnyOp:
    """The op of a name: torch's, or the author's, with or without the package.

    Raises:
        UnknownOpError: There is none, or more than one.
    """
    host = kit.current()
    host.load()
    if name in host.ops:
        return host.ops[name]
    package, _, last = name.rpartition(".")
    found = [
        op
        for op in host.ops.values()
        if op.spec.body.__name__ == last and f"{op.spec.body.__module__}.".startswith(f"{package}." if package else "")
    ]
    if len(found) == 1:
        return found[0]
    known = sorted({*host.ops, *(op.spec.body.__name__ for op in host.ops.values())})
    close = difflib.get_close_matches(last, known, 3)
    several = ", ".join(f"'{op.spec.name}'" for op in found)
    raise UnknownOpError(
        f"op '{name}'",
        f"is one of several: {several}" if found else "is not defined",
        why="nothing else has this name" if not found else "their authors gave them the same name",
        todo=f"Use torch's name, one of {several}"
        if found
        else f"Did you mean {' or '.join(map(repr, close))}?"
        if close
        else "See `hopkit ops` for those that are; an op of a plugin needs the plugin to be installed",
    )


def function_name(spec: OpSpec) -> str:
    """The author's name for an op, with its module."""
    return f"{spec.body.__module__}.{spec.body.__qualname__}"


def _rows(op: AnyOp, mode: Mode, plugins: Plugins) -> Iterator[Row]:
    answers = op.table.get(mode.name, ())
    asked = _asked(op, mode, plugins)
    for device in dict.fromkeys(["", *(answer.device for answer in answers)]):
        chain = [answer for answer in answers if answer.device in ("", device)]
        name = f"{mode.name} ({device})" if device else mode.name
        if chain:
            first, *rest = chain
            kind: Kind = _kind(op.spec, mode, first)
            yield Row(name, kind, _whose(first), first.where, asked, _note(op.spec, kind, first, rest))
        elif mode.default == "derived" and not mode.open:
            kind = "decomposing" if op.spec.untransformed else "derived"
            yield Row(name, kind, "", "", asked, mode.gives)
        else:
            missing = mode.open and mode.default == "derived"
            yield Row(name, "missing" if missing else "decomposing", "", "", asked, "the body runs in the mode")


def _kind(spec: OpSpec, mode: Mode, answer: Answer) -> Kind:
    if isinstance(answer.rule, Contested):
        return "conflict"
    if answer.place is not Place.BUILTIN:
        return "hand-written"
    if mode.name == "autograd" and spec.autograd != "derive":
        return "refusing"
    if mode.name in ("vmap", "jvp") and spec.untransformed:
        return "decomposing"
    return "decomposing" if mode.default == "decomposing" else "derived"


def _whose(answer: Answer) -> str:
    return "author" if answer.place is Place.AUTHOR else answer.plugin


def _asked(op: AnyOp, mode: Mode, plugins: Plugins) -> tuple[str, ...]:
    author = ["author"] if any(answer.mode == mode.name for answer in op.author) else []
    impls = plugins.impls(f"hopkit_{mode.name}_rule", op.spec.name) if mode.open else ()
    return tuple(dict.fromkeys([*author, *(impl.plugin for impl in impls)]))


def _note(spec: OpSpec, kind: Kind, first: Answer, rest: list[Answer]) -> str:
    if isinstance(first.rule, Contested):
        return str(first.rule.error())
    if kind == "refusing":
        return f'autograd="{spec.autograd}"'
    if kind == "derived" and first.mode == "fake" and spec.outputs is not None:
        return "from outputs="
    if kind == "hand-written" and rest:
        return f"may decline to {', '.join(map(_whose, rest))}"
    return ""


def _short(where: str) -> str:
    """A path as short as it is clear: from the working directory, or from the folder of installed packages."""
    path, _, line = where.rpartition(":")
    if not path:
        return where
    for root in (Path.cwd(), *(p for p in Path(path).parents if p.name == "site-packages")):
        if Path(path).is_relative_to(root):
            return f"{Path(path).relative_to(root)}:{line}"
    return where
