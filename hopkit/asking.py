"""Who asks for an op whole, besides what records it: known once its rules are, so that a call need not look."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch

from hopkit._torch import checkpoint, keys, levels, state, trees
from hopkit.modes import Mode
from hopkit.rule import Answer, Place, Table, ask, takes_calls
from hopkit.spec import OpSpec

Function = Callable[..., object]


@dataclasses.dataclass(frozen=True)
class Asking:
    """What the rules of an op that are not built in ask for.

    Args:
        spec: The op.
        always: Every call: there is a kernel, a derivative or a backend's rule.
        modes: Calls while a dispatch mode of one of these classes is active.
        subclasses: Calls on tensors of these classes.
        kernels: Who answers a call that nothing records, differentiates or transforms. Empty where nothing is asked
            for, or where a rule for a subclass or a backend comes first.
        derivative: Whether one is written by hand. It sees the author's arguments.
        tangents: Whether it is marked with `on_call`: it answers for tensors with tangents of plain forward mode too.
        in_place: For tensors of a class, rules that take the place of the body.
        transforms: The modes of the transforms of torch.func that a rule is written for.
        whole: Whether a kernel, or a way to record the op, is written by hand. It sees the op, and not a part of it.
    """

    spec: OpSpec
    always: bool = False
    modes: frozenset[type] = frozenset()
    subclasses: tuple[type, ...] = ()
    kernels: tuple[Answer, ...] = ()
    derivative: bool = False
    tangents: bool = False
    whole: bool = False
    transforms: frozenset[str] = frozenset()
    in_place: tuple[tuple[type, tuple[Answer, ...]], ...] = ()

    @property
    def quietly(self) -> bool:
        """Whether a call may be asked for that no mode, tracer or profiler sees, whatever its operands are."""
        return self.always or bool(self.transforms)

    @property
    def by_operands(self) -> bool:
        """Whether a call may be asked for because of what its operands are."""
        # A fake tensor, or one of the meta device, comes without a mode as well.
        return bool(self.subclasses or self.in_place) or keys.FAKE in self.modes

    def asks(self, operands: Sequence[object]) -> bool:
        """Whether something that is active asks for a call on these operands. Nothing records."""
        leaves = trees.leaves(operands)
        if state.beyond_recording(leaves):
            return False
        if state.transforming():
            return self.by_transform()
        if state.forward_mode():  # a derivative has no word on tangents, unless it says so
            return self.tangents or self.by_transform()
        if "jvp" in self.transforms and any(map(levels.has_tangent, leaves)):
            return True  # in a graph that has entered dual numbers without telling Python
        if self.always:
            return True
        if ("functionalize" in self.transforms and levels.functionalizes()) or self.declared(leaves):
            return True
        for mode in state.dispatch_modes():
            if type(mode) in self.modes or (state.takes_ops(mode) and checkpoint.stays(mode)):
                return True
        return bool(self.subclasses) and any(isinstance(leaf, self.subclasses) for leaf in leaves)

    def by_transform(self) -> bool:
        """Whether a rule is written for a transform that is active, or for dual numbers."""
        written = self.transforms
        return bool(written) and (
            not written.isdisjoint(state.transforms()) or ("jvp" in written and levels.has_duals())
        )

    def declared(self, operands: Sequence[object]) -> bool:
        """Whether the operands have no values, and ``outputs=`` or a rule for that says what the result is.

        In a graph, what stands for the result would be taken for its values.
        """
        told = self.spec.outputs is not None or keys.FAKE in self.modes
        return told and not state.recording() and state.shapes_only(trees.leaves(operands))

    def instead(self, body: Function, operands: Sequence[object]) -> Function:
        """``body``, or what takes its place on tensors of a class that a plugin serves."""
        if not self.in_place or state.recording() or state.transforming() or state.forward_mode():
            return body
        for entry, answers in self.in_place:
            if any(isinstance(leaf, entry) for leaf in trees.leaves(operands)):
                rules = [functools.partial(cast("Function", answer.rule), entry) for answer in answers]
                return functools.partial(ask, self.spec.name, answers[0].mode, [*rules, body])
        return body


def asking(spec: OpSpec, table: Table, modes: Sequence[Mode]) -> Asking:
    """What the rules in ``table`` ask for."""
    written = {mode for mode, answers in table.items() if answers and answers[0].place is not Place.BUILTIN}
    in_place = {mode.name: mode.entry for mode in modes if mode.name in written and mode.in_place}
    written -= in_place.keys()
    entries = [_BUILTIN.get(mode.name, mode.entry) for mode in modes if mode.name in written]
    classes = [entry for entry in entries if isinstance(entry, type)]
    subclasses = tuple(cls for cls in classes if issubclass(cls, torch.Tensor))
    backends = any(isinstance(entry, keys.DispatchKey) for entry in entries)
    by_hand = not written.isdisjoint({"device", "autograd"})
    transforms = written & {"vmap", "jvp", "functionalize"}
    derivative = table["autograd"][0].rule if "autograd" in written else None
    on_calls = takes_calls(derivative)
    if derivative is not None:  # a pair is that of a batch, too, and a rule on calls is told of it
        transforms |= {"grad", "vmap"} if on_calls or hasattr(derivative, "backward") else {"grad"}
    return Asking(
        spec,
        always=by_hand or backends,
        modes=frozenset(classes).difference(subclasses),
        subclasses=subclasses,
        kernels=table["device"] if by_hand and not (subclasses or backends) else (),
        derivative=derivative is not None,
        tangents=on_calls,
        in_place=tuple((entry, table[name]) for name, entry in in_place.items() if isinstance(entry, type)),
        transforms=frozenset(transforms),
        whole=backends or not written.isdisjoint({"device", "functionalize", "proxy", "inductor"}),
    )


_BUILTIN = {"fake": keys.FAKE, "proxy": keys.PROXY, "functionalize": keys.FUNCTIONALIZE}
