"""Stand-ins for subgraphs, and the closed graphs that become of them."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch

from hopkit import codec
from hopkit._torch import sizes, trees
from hopkit._torch.state import has_no_value
from hopkit._torch.watch import Same, Substitute
from hopkit.codec import Slot
from hopkit.errors import HopkitWarning, LayoutError, PropertyError, SubgraphError
from hopkit.layout import Meta, Slots, Variant, arguments, fill
from hopkit.spec import OpSpec

MOST_SIGNATURES = 64
"""How many graphs one node may carry; a call that needs more decomposes."""


class Unrecordable(Exception):
    """The call cannot be one node of a graph; running the body in its place is right.

    Args:
        reason: Why not.
        property_: What to declare in `define`, if that would help.
        declared: The op's author said that this would happen.
    """

    def __init__(self, reason: str, property_: str = "", *, declared: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.property, self.declared = reason, property_, declared

    def report(self, spec: OpSpec) -> None:
        """Warn that the call decomposes; under ``HOPKIT_STRICT=1`` raise instead. What is declared is no news."""
        if self.declared:
            return
        todo = f"Declare `{self.property}` in define" if self.property else "Change the subgraph, or live with it"
        if os.environ.get("HOPKIT_STRICT", "0") not in ("", "0"):
            raise PropertyError(
                f"op '{spec.name}'", self.reason, why="a node of a graph must be a function of its inputs", todo=todo
            )
        warnings.warn(
            f"op '{spec.name}' is not kept in the graph, its body is recorded in its place: {self.reason}. {todo}.",
            HopkitWarning,
            stacklevel=4,
        )


class Unrehearsable(Unrecordable):
    """The body, or a subgraph, raised something on stand-ins."""


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """One subgraph on one signature, closed: every tensor it uses is an input.

    Args:
        function: The author's callable.
        takes: As in `Variant`.
        captured: The outside values it uses; the inputs after the slots of ``takes`` stand in for them.
        key: Equal for graphs that would be traced to the same code.
        gradients: Whether gradients were on where the op was called; the callable may ask.
    """

    function: Callable[..., object]
    takes: object
    slots: int
    captured: tuple[object, ...]
    key: tuple[object, ...]
    gradients: bool

    def __call__(self, *inputs: object) -> tuple[object, ...]:
        stand_ins = {identity(old): new for old, new in zip(self.captured, inputs[self.slots :], strict=True)}
        args, kwargs = cast("tuple[tuple[object, ...], dict[str, object]]", fill(self.takes, inputs))
        with Substitute(lambda value: stand_ins.get(identity(value), value)) as mode:
            result = self.function(*args, **kwargs)
        outputs = Slots(unique=())
        outputs.split(mode.replaced(result))
        return tuple(outputs.inputs)


def identity(value: object) -> object:
    """What a tensor, or a symbolic number, is looked up by."""
    return id(value) if isinstance(value, torch.Tensor) else str(value)


class Rehearsing(Protocol):
    """The rehearsal that a probe is part of."""

    spec: OpSpec
    inputs: list[object]

    def names(self) -> sizes.Names:
        """New names for the sizes and numbers that came up in this rehearsal."""

    def run(
        self,
        function: Callable[..., object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
        inputs: Sequence[object],
    ) -> tuple[object, list[int], tuple[object, ...]]:
        """Call a subgraph, with stand-ins in place of what it takes from outside.

        Returns:
            Its result; the numbers of the outside values; its steps, equal where the same is done to other values.
        """


class Probe:
    """Stands in for a subgraph while its op's body is rehearsed."""

    def __init__(self, recorder: Rehearsing, name: str, function: Callable[..., object]) -> None:
        self._recorder, self.name, self.function = recorder, name, function
        self.calls: list[_Seen] = []

    def __call__(self, /, *args: object, **kwargs: object) -> object:
        slots = arguments()
        takes = slots.split((args, kwargs))
        result, used, steps = self._recorder.run(self.function, args, kwargs, slots.inputs)
        gives = _itself(Slots(unique=()).split(self._checked(result)), trees.leaves(result), slots.inputs)
        self.calls = self._merged([*self.calls, _Seen(takes, tuple(slots.inputs), used, steps, gives)])
        return result

    def _merged(self, calls: Sequence[_Seen]) -> list[_Seen]:
        """One call per signature. Signatures can become one afterwards, when a symbolic size turns out to be fixed."""
        merged: list[tuple[_Seen, object, object]] = []
        for call in calls:
            always, now = call.signature(self._recorder.names()), call.signature(sizes.now)
            known = next((m for m, other, _ in merged if other == always), None)
            changed = known and (known.used, known.steps, known.gives) != (call.used, call.steps, call.gives)
            # Sizes that are equal by chance are told apart by nothing when the graph runs.
            if changed or any(other == now and m.operators != call.operators for m, _, other in merged):
                raise Unrecordable(f"subgraph '{self.name}' does something else when it is called again")
            if known is None:
                merged.append((call, always, now))
        if len(merged) > MOST_SIGNATURES:
            raise Unrecordable(f"subgraph '{self.name}' is called on more than {MOST_SIGNATURES} different signatures")
        return [call for call, *_ in merged]

    def _check_writable(self, takes: object) -> None:
        try:
            codec.dumps(takes)
        except LayoutError as error:
            raise SubgraphError(
                f"subgraph '{self.name}' of op '{self._recorder.spec.name}'",
                f"was given {error.who}, which {error.found}",
                why=error.why,
                todo=error.todo,
            ) from None

    def _checked(self, result: object) -> object:
        for leaf in trees.leaves(result):
            if not (leaf is None or isinstance(leaf, _CARRIED)):
                raise SubgraphError(
                    f"subgraph '{self.name}' of op '{self._recorder.spec.name}'",
                    f"returned a {type(leaf).__qualname__}: {leaf!r}",
                    why="what a subgraph returns becomes outputs of a graph",
                    todo="Return a pytree (tuple, list, dict, named tuple, registered dataclass) of tensors or numbers",
                )
        return result

    def close(self, first: int) -> tuple[list[Graph], tuple[Variant, ...]]:
        """The graphs of this subgraph, numbered from ``first``, and what the layout says of them."""
        graphs: list[Graph] = []
        variants: list[Variant] = []
        # The same tensor twice comes before two tensors, which the same one twice would pass for.
        for call in sorted(self._merged(self.calls), key=lambda call: len(call.inputs)):
            self._check_writable(call.takes)
            captured = tuple(self._recorder.inputs[i] for i in call.used)
            gradients = torch.is_grad_enabled()
            key = (Same(self.function), repr(call.takes), len(call.used), call.steps, gradients)
            variants.append(Variant(first + len(graphs), call.takes, call.metas, tuple(call.used), call.gives))
            graphs.append(Graph(self.function, call.takes, len(call.inputs), captured, key, gradients))
        return graphs, tuple(variants)


def _itself(gives: object, leaves: Sequence[object], inputs: Sequence[object]) -> object:
    """``gives`` with the argument in place of every output that is one: a graph without mutation gives another tensor.

    Argument ``i`` is slot ``-1 - i``.
    """
    places = {id(value): Slot(-1 - i) for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
    slots, tree = trees.flatten(gives)
    return trees.unflatten([places.get(id(leaf), slot) for leaf, slot in zip(leaves, slots, strict=True)], tree)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """One call of a subgraph: what it took, which inputs of the op it used besides, what it did and gave."""

    takes: object
    inputs: tuple[object, ...]
    used: list[int]
    steps: tuple[object, ...]
    gives: object

    @property
    def metas(self) -> tuple[Meta, ...]:
        return tuple(map(Meta.of, self.inputs))

    def signature(self, describe: sizes.Describe) -> object:
        """What tells it from other calls, with its sizes in the words of ``describe``."""
        return self.takes, [Meta.of(value, describe) for value in self.inputs]

    @property
    def operators(self) -> list[object]:
        """What it did, no matter to what."""
        return [step[0] for step in self.steps if isinstance(step, tuple) and step]


_CARRIED = (torch.Tensor, *sizes.SYMBOLIC, int, float, bool, complex)


def variable_name(function: Callable[..., object], value: object) -> str:
    """What ``function`` calls a value that it closes over."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, torch.nn.Module):
        for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
            if tensor is value:
                return name
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    for name, cell in zip(code.co_freevars if code else (), cells, strict=True):
        held = cell.cell_contents
        if held is value:
            return str(name)
        if isinstance(held, torch.nn.Module):
            inner = variable_name(held, value)
            if inner != _UNNAMED:
                return f"{name}.{inner}"
    for name in code.co_names if code else ():
        if function.__globals__.get(name) is value:
            return str(name)
    return _UNNAMED


def real_captures(function: Callable[..., object]) -> list[str]:
    """The names of the tensors with values that ``function`` closes over."""
    held: list[object] = []
    owner = getattr(function, "__self__", function)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    code, scope = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    for value in (owner, *cells, *(scope.get(name) for name in (code.co_names if code else ()))):
        held += [*value.parameters(), *value.buffers()] if isinstance(value, torch.nn.Module) else [value]
    real = [value for value in held if isinstance(value, torch.Tensor) and not has_no_value(value)]
    return [name for value in real if (name := variable_name(function, value)) != _UNNAMED]


_UNNAMED = "a tensor"
