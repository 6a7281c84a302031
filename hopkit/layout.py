"""The node's codec: between an op's own arguments and the one flat form that all of torch accepts.

A recorded op is ``op(graph0, graph1, ..., (tensor0, tensor1, ...), **options, hopkit="...")``. The `Layout`, written
into ``hopkit=``, says what the flat form cannot: the pytrees, the constants inside them, which graph is which subgraph
on which signature, and which inputs it captures.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from hopkit import codec
from hopkit._torch import sizes, trees
from hopkit._torch.sizes import Equal
from hopkit.codec import Dim, Slot
from hopkit.errors import LayoutError

VERSION = 3
KEYWORD = "hopkit"
REGION = "region"
FUNCTIONAL = "functional"
DRAWING, REDRAWN = "drawing", "redrawn"


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a subgraph is recorded for: one tensor's dtype, device type and sizes, or (dtype None) a number."""

    dtype: torch.dtype | None
    device: str
    shape: tuple[Dim, ...]

    @classmethod
    def of(cls, value: object, describe: sizes.Describe = sizes.describe) -> Meta:
        """The meta of a tensor, a number or a symbolic one; ``describe`` writes its sizes."""
        if isinstance(value, torch.Tensor):
            return cls(value.dtype, value.device.type, tuple(map(describe, value.shape)))
        return cls(None, sizes.number(value), (describe(cast("int", value)),))

    def bind(self, value: object, symbols: dict[str, int], *, unbacked: bool = False) -> None:
        """Learn from ``value`` what the symbols among the sizes stand for; if ``unbacked``, from what nobody knows."""
        for dim, size in zip(self.shape, _sizes(value), strict=False):
            if isinstance(dim, str) and dim.isidentifier() and (not unbacked or sizes.unbacked(size)):
                symbols.setdefault(dim, size)

    def example(self, symbols: dict[str, int], new: Callable[[str], int]) -> object:
        """A value that fits. What ``symbols`` does not tell is ``new``, a number of that type, and told from then."""
        kind = self.device if self.dtype is None else "int"
        shape = [_told(d, symbols, lambda: new(kind)) if isinstance(d, str) else d for d in self.shape]
        return shape[0] if self.dtype is None else torch.empty(shape, dtype=self.dtype, device=self.device)

    def fits(self, value: object, symbols: Mapping[str, int], equal: Equal = Equal.PERHAPS) -> bool:
        """Whether ``value`` is what was recorded."""
        if isinstance(value, torch.Tensor):
            if value.dtype != self.dtype or value.device.type != self.device:
                return False
        elif self.dtype is not None or self.device != sizes.number(value):
            return False
        actual = _sizes(value)
        expected = (codec.evaluate(dim, symbols) if isinstance(dim, str) else dim for dim in self.shape)
        return len(actual) == len(self.shape) and all(map(equal.holds, expected, actual))

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return shape if self.dtype is None else f"{str(self.dtype).removeprefix('torch.')}[{shape}]@{self.device}"


def _told(dim: str, symbols: dict[str, int], new: Callable[[], int]) -> int:
    size = codec.evaluate(dim, symbols)
    if size is None and dim not in symbols:
        symbols[dim] = new()
    return symbols[dim] if size is None else size


def _sizes(value: object) -> Sequence[int]:
    return value.shape if isinstance(value, torch.Tensor) else (cast("int", value),)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One subgraph on one signature.

    Args:
        graph: Which of the node's graphs it is.
        takes: ``(args, kwargs)`` of the call, with a `Slot` for every tensor and SymInt.
        metas: What stands in the slots of ``takes``.
        captures: Which of the node's inputs follow the slots.
        gives: The result, with a `Slot` for every output of the graph; ``Slot(-1 - i)`` is what stands in slot ``i`` of
            ``takes``, given back.
        writes: The slots that are to hold, afterwards, what the graph gives last: it writes to nothing itself.
    """

    graph: int
    takes: object
    metas: tuple[Meta, ...]
    captures: tuple[int, ...]
    gives: object
    writes: tuple[int, ...] = ()

    @classmethod
    def of(cls, inputs: Sequence[object]) -> Variant:
        """A variant that takes ``inputs`` and has no graph: for comparing, and for messages."""
        return cls(-1, None, tuple(map(Meta.of, inputs)), (), None)

    def match(
        self, leaves: Sequence[object], tree: trees.Tree, symbols: Mapping[str, int], equal: Equal
    ) -> list[object] | None:
        """The graph's inputs among the leaves of a call, or None where this was not recorded for it."""
        expected, structure = self._taken
        if tree != structure:
            return None
        slots: list[object] = []
        known = dict(symbols)
        for want, leaf in zip(expected, leaves, strict=True):
            if isinstance(want, Slot) and want.index < len(slots):
                if leaf is not slots[want.index]:
                    return None
            elif isinstance(want, Slot):
                self.metas[want.index].bind(leaf, known, unbacked=equal is not Equal.PERHAPS)
                slots.append(leaf)
            elif type(want) is not type(leaf) or want != leaf:
                return None
        return slots if all(m.fits(s, known, equal) for m, s in zip(self.metas, slots, strict=True)) else None

    @functools.cached_property
    def _taken(self) -> tuple[list[object], trees.Tree]:
        return trees.flatten(self.takes)

    @functools.cached_property
    def _given(self) -> tuple[list[object], trees.Tree]:
        return trees.flatten(self.gives)

    def result(self, outputs: Sequence[object], slots: Sequence[object]) -> object:
        """The result of the call, from what the graph gave and what was in the slots."""
        leaves, tree = self._given
        values = [*outputs, *reversed(slots)]
        return trees.unflatten([values[leaf.index] if isinstance(leaf, Slot) else leaf for leaf in leaves], tree)

    def describe(self) -> str:
        """The signature, for messages."""
        return f"({', '.join(map(str, self.metas))})"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a node's graphs and inputs make up the op's arguments, and its outputs the op's result.

    Args:
        values: Every operand, and every option that is no keyword of the node, by name; a `Slot` is an input.
        subgraphs: The variants of every subgraph, by parameter; a tuple of subgraphs has several entries.
        metas: What the inputs were when the op was recorded.
        outputs: Which leaves of the body's result the node returns.
        leaves: How many there are.
        transforms: What was done to the body, innermost first: ``("vjp", wrt, given)``, or ``("functional", written)``
            of one that writes to inputs. In a part of an op that trains, ``("region", part)`` comes first: the one
            graph is the body, from the inputs to the outputs.
        digest: What the op was when it was recorded (hopkit/digest.py); "" where that cannot be told.
        origin: Where the op came from: its module, and its distribution (hopkit/origin.py).
    """

    values: Mapping[str, object]
    subgraphs: Mapping[str, tuple[tuple[Variant, ...], ...]]
    metas: tuple[Meta, ...]
    outputs: tuple[int, ...]
    leaves: int
    transforms: tuple[tuple[object, ...], ...] = ()
    digest: str = ""
    origin: tuple[str, str] = ("", "")

    def dumps(self) -> str:
        """The text for the node's ``hopkit=`` keyword."""
        parts = (
            VERSION,
            dict(self.values),
            {name: tuple(tuple(map(_variant_out, v)) for v in many) for name, many in self.subgraphs.items()},
            tuple(map(_meta_out, self.metas)),
            self.outputs,
            self.leaves,
            self.transforms,
            self.digest,
            self.origin,
        )
        return _signed(codec.dumps(parts))

    @property
    def added(self) -> int:
        """How many inputs come with the transforms, after those of the op: gradients, tangents, states."""
        numbers: dict[object, int] = {"vjp": 2, "jvp": 1, REDRAWN: 1}
        return sum(len(cast("Sequence[int]", t[numbers[t[0]]])) for t in self.transforms if t[0] in numbers)

    def capturing(self, added: Sequence[Sequence[Meta]], at: int) -> Layout:
        """This layout with more inputs, from number ``at``: graph number i captures ``added[i]``, too.

        Args:
            added: What they are, by graph.
            at: How many inputs the op has so far. What comes with transforms comes after the new ones.
        """
        ends = list(itertools.accumulate(map(len, added), initial=at))

        def more(v: Variant) -> Variant:
            return dataclasses.replace(v, captures=(*v.captures, *range(ends[v.graph], ends[v.graph + 1])))

        subgraphs = {name: tuple(tuple(map(more, v)) for v in many) for name, many in self.subgraphs.items()}
        metas = () if self.region else (*self.metas, *itertools.chain(*added))
        transforms = tuple(_moved(step, at, ends[-1] - at) for step in self.transforms)
        return dataclasses.replace(self, subgraphs=subgraphs, metas=metas, transforms=transforms)

    def writing(self, written: Sequence[tuple[int, ...]]) -> Layout:
        """This layout where graph number i does not write to ``written[i]`` of its inputs, but gives what they hold."""

        def more(v: Variant) -> Variant:
            return dataclasses.replace(v, writes=(*v.writes, *written[v.graph]))

        subgraphs = {name: tuple(tuple(map(more, v)) for v in many) for name, many in self.subgraphs.items()}
        return dataclasses.replace(self, subgraphs=subgraphs)

    @property
    def region(self) -> str:
        """Which part of an op that trains this is, "forward" or "backward"; "" for all others."""
        name, part = self.transforms[0][:2] if self.transforms else ("", "")
        return cast("str", part) if name == REGION else ""

    def symbols(self, inputs: Sequence[object]) -> dict[str, int]:
        """What the symbols among the recorded sizes stand for in a call with these inputs."""
        symbols: dict[str, int] = {}
        for meta, value in zip(self.metas, inputs, strict=False):
            meta.bind(value, symbols)
        return symbols


def _moved(step: tuple[object, ...], at: int, count: int) -> tuple[object, ...]:
    """A transform where ``count`` inputs were put before number ``at``."""
    name, which, *rest = step
    if name in (REGION, DRAWING, REDRAWN):
        return step
    numbers = cast("tuple[int | None, ...]", which)
    if name == "vmap":
        return (name, (*numbers[:at], *[None] * count, *numbers[at:]), *rest)
    return (name, tuple(i + count if i >= at else i for i in cast("tuple[int, ...]", numbers)), *rest)


def _meta_out(meta: Meta) -> tuple[object, ...]:
    return (meta.dtype, meta.device, meta.shape)


def _variant_out(v: Variant) -> tuple[object, ...]:
    text = (v.graph, v.takes, tuple(map(_meta_out, v.metas)), v.captures, v.gives, v.writes)
    return text if v.writes else text[:-1]


_VariantText = tuple[int, object, tuple[object, ...], tuple[int, ...], object, tuple[int, ...]]
"""The last may be missing."""


def _variant_in(data: _VariantText) -> Variant:
    graph, takes, metas, captures, gives, writes = (*data, ())[:6]
    return Variant(graph, takes, _metas_in(metas), captures, gives, writes)


def _metas_in(data: tuple[object, ...]) -> tuple[Meta, ...]:
    return tuple(Meta(*cast("tuple[torch.dtype | None, str, tuple[Dim, ...]]", m)) for m in data)


def origin(text: str) -> tuple[str, str]:
    """Where a node's op comes from, as far as the text tells. The classes that it names may be missing with the op."""
    try:
        *_, (_, module, distribution), _ = json.loads(text)
    except (ValueError, TypeError):
        return "", ""
    return str(module), str(distribution)


def loads(text: str) -> Layout:
    """The layout that `Layout.dumps` wrote.

    Raises:
        LayoutError: It is damaged, or was written by another version of hopkit.
    """
    # A class that it names may be another by now: a module is reloaded, in a notebook every day.
    return _read(text) if codec.names_classes(text) else _remembered(text)


def _read(text: str) -> Layout:
    return codec.loads(text, functools.partial(_layout_in, text))


_remembered = functools.lru_cache(maxsize=4096)(_read)


def _layout_in(text: str, data: object) -> Layout:
    version, *rest = cast("tuple[object, ...]", data)
    if version != VERSION:
        raise LayoutError(
            "hopkit=",
            f"is of layout version {version!r}, and this hopkit reads version {VERSION}",
            why="a node that is read wrongly would compute something else",
            todo="Record the graph again, or install the hopkit that made it",
        )
    if _signed(text.rpartition(",")[0] + "]") != text:
        raise ValueError("it is damaged: its checksum is another")
    values, subgraphs, metas, outputs, leaves, transforms, digest, origin, _ = rest
    return Layout(
        cast("dict[str, object]", values),
        {
            name: tuple(tuple(map(_variant_in, variants)) for variants in many)
            for name, many in cast("dict[str, tuple[tuple[_VariantText, ...], ...]]", subgraphs).items()
        },
        _metas_in(cast("tuple[object, ...]", metas)),
        cast("tuple[int, ...]", outputs),
        cast("int", leaves),
        cast("tuple[tuple[object, ...], ...]", transforms),
        cast("str", digest),
        cast("tuple[str, str]", origin),
    )


def _signed(text: str) -> str:
    """A list with a checksum as its last item: torch reads a damaged file without a word."""
    return f"{text[:-1]},{zlib.crc32(text.encode())}]"


class Slots:
    """Splits pytrees into what a graph takes as inputs (tensors, SymInts) and the constants around them.

    Args:
        unique: The kinds of which each value is one input, however often it comes.
    """

    def __init__(self, *, unique: tuple[type, ...] = (object,)) -> None:
        self.inputs: list[object] = []
        self._unique = unique
        self._seen: dict[int, Slot] = {}

    def split(self, value: object) -> object:
        """``value`` with a `Slot` in place of every input, which is appended to ``inputs``."""
        leaves, tree = trees.flatten(value)
        return trees.unflatten([self._slot(leaf) for leaf in leaves], tree)

    def _slot(self, leaf: object) -> object:
        if not isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return leaf
        if not isinstance(leaf, self._unique) or id(leaf) not in self._seen:
            self._seen[id(leaf)] = Slot(len(self.inputs))
            self.inputs.append(leaf)
        return self._seen[id(leaf)]


def arguments() -> Slots:
    """Slots for what a subgraph is called with: its code may ask whether two tensors are the same one."""
    return Slots(unique=(torch.Tensor,))


def parameter_of(values: Mapping[str, object], index: int) -> str:
    """Of ``values`` by parameter, the one that input number ``index`` belongs to, or "" for a capture."""
    for name, value in values.items():
        if any(isinstance(leaf, Slot) and leaf.index == index for leaf in trees.leaves(value)):
            return name
    return ""


def fill(value: object, inputs: Sequence[object]) -> object:
    """``value`` with the inputs in place of its slots; the inverse of `Slots.split`."""
    return trees.map_only(Slot, lambda slot: inputs[slot.index], value)
