"""dynamo: ``rule(frame, op)``. What a rule gives, and what `Frame` holds, are Dynamo's variables, not values.

Nothing records while the rule runs: `Frame` reads the subgraphs, and writes the node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch

from hopkit import binding, layout
from hopkit._torch import trees
from hopkit._torch.ahead import AHEAD, Ahead
from hopkit._torch.autograd import needs_gradient
from hopkit._torch.dynamo import undecorated
from hopkit._torch.state import foreign, transforming
from hopkit.call import Call
from hopkit.codec import Slot
from hopkit.errors import HopkitError
from hopkit.layout import Meta, arguments
from hopkit.probe import Graph, Unrecordable
from hopkit.record import Recorder, Recording
from hopkit.spec import Kind, OpSpec, Parameter

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from hopkit._torch.frame import Frame, Variable
    from hopkit._torch.operator import Operator
    from hopkit._torch.read import Read

__all__ = ["AHEAD", "Ahead", "DynamoRule", "inline", "record", "undecorated"]


class DynamoRule(Protocol):
    """Puts a call that Dynamo reads into its graph, and gives its result."""

    def __call__(self, frame: Frame, op: OpSpec, /) -> Variable: ...


def inline(frame: Frame, op: OpSpec) -> Variable:  # noqa: ARG001 # a rule
    """Let Dynamo read the body in the op's place: the op vanishes."""
    return frame.inlined()


def record(frame: Frame, op: OpSpec) -> Variable:
    """Read every subgraph on what the body calls it with, and write one node.

    Raises:
        Unsupported: Dynamo cannot read a subgraph in one piece, or the body needs values. A graph break.
    """
    if frame.flat:
        return _record_node(frame, op)
    if op.outline and op.pure and (known := frame.again()):
        return known
    told = _Told(frame, op)
    try:
        values = _values(frame, op, told)
        digest = cast("Operator", frame.target).digest()
        recorder = Recorder(op, values)
        if transforming() and any(map(foreign, recorder.inputs)):
            return frame.inlined()  # a tensor subclass sees the inside there, as in eager
        recording = recorder.record(digest)
        deferred = op.autograd == "deferred_error" and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        if deferred and (transforming() or (op.mutates and needs_gradient(recording.inputs))):
            return frame.inlined()  # nobody would raise the error there, and the gradient would be lost
        return _write(frame, op, values, recording)
    except Unrecordable as reason:
        told.complain()
        reason.report(op)
    except (LookupError, NotImplementedError):
        pass  # a size from elsewhere, or an option that Dynamo takes for no constant: read in place, they need no name
    except HopkitError as error:
        told.complain()
        frame.refuse(f"op '{op.name}'", error)
    return frame.inlined()


def _record_node(frame: Frame, op: OpSpec) -> Variable:
    """A node in code that was recorded or loaded: its graphs are read, and it is written anew."""
    told = _Told(frame, op)
    constants = {name: frame.option(value) for name, value in frame.kwargs.items()}
    try:
        known = layout.loads(cast("str", constants.pop(layout.KEYWORD)))
        *graphs, inputs = frame.args
        read = [_Subgraph(frame, told, str(number), graph) for number, graph in enumerate(graphs)]
        target, values = cast("Operator", frame.target), tuple(trees.leaves(frame.value(inputs)))
        call = Call(op, target, tuple(read), values, constants, dataclasses.replace(known, digest=target.digest()))
        found = [subgraph.read(example, {}) for subgraph, example in zip(read, call.examples, strict=True)]
        call = call.capturing([graph.tensors for graph in found])  # what a graph holds itself Dynamo makes an input
        closed = [frame.close(graph, graph.tensors) for graph in found]
        return frame.emit(dict(zip(closed, call.graph_names(), strict=True)), closed, call.inputs, call.keywords)
    except (HopkitError, LookupError, NotImplementedError) as error:
        told.complain()
        frame.refuse(f"a node of op '{op.name}'", error)


class _Told:
    """The first thing in a call's subgraphs that Dynamo could not read. The body must not swallow it."""

    def __init__(self, frame: Frame, op: OpSpec) -> None:
        self._frame, self._op = frame, op
        self.failed: tuple[str, Exception] | None = None

    def complain(self) -> None:
        """Raise it, with the subgraph's name."""
        if self.failed is not None:
            name, error = self.failed
            self._frame.unread(error, f"subgraph '{name}' of op '{self._op.name}'")


class _Subgraph:
    """Stands in for a subgraph while the body is rehearsed: Dynamo reads it, once for every signature."""

    def __init__(self, frame: Frame, told: _Told, name: str, variable: Variable) -> None:
        self._frame, self._told, self._name, self._variable = frame, told, name, variable
        self._read: dict[tuple[object, ...], Read] = {}
        self._taken: dict[tuple[object, ...], tuple[object, Sequence[object]]] = {}

    def __call__(self, /, *args: object, **kwargs: object) -> object:
        slots = arguments()
        slots.split((args, kwargs))
        return self.read(args, kwargs)(slots.inputs)

    def read(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Read:
        """What Dynamo reads on these arguments."""
        slots = arguments()
        takes = slots.split((args, kwargs))
        key = (_signature(takes, slots.inputs), *map(_closely, slots.inputs), torch.is_grad_enabled())
        if key not in self._read:
            try:
                self._read[key] = self._frame.read(self._name, self._variable, (args, kwargs), slots.inputs)
                self._taken[key] = takes, slots.inputs
            except Exception as error:
                self._told.failed = self._told.failed or (self._name, error)
                raise
        return self._read[key]

    def close(self, graph: Graph, metas: Sequence[Meta]) -> GraphModule:
        """The graph of one signature, with the inputs that the layout has for it."""
        wanted = (repr(graph.takes), tuple(metas))  # sizes may have turned out to be equal since
        read = next(read for key, read in self._read.items() if _signature(*self._taken[key]) == wanted)
        return self._frame.close(read, graph.captured)


def _signature(takes: object, inputs: Sequence[object]) -> object:
    return repr(takes), tuple(map(Meta.of, inputs))


def _closely(value: object) -> object:
    """What else of an argument the code of a subgraph may ask for."""
    return (repr(value.stride()), value.requires_grad) if isinstance(value, torch.Tensor) else None


def _values(frame: Frame, op: OpSpec, told: _Told) -> dict[str, object]:
    """What the body is rehearsed with, by parameter."""
    given = binding.by_name(op, frame.args, frame.kwargs)
    values = binding.checked(op, {p.name: _seen(frame, p, given[p.name]) for p in op.parameters})
    for p in op.of_kind(Kind.SUBGRAPH):
        values[p.name] = _Subgraph(frame, told, p.name, cast("Variable", given[p.name]))
    for p in op.of_kind(Kind.SUBGRAPHS):
        many = enumerate(frame.items(given[p.name]))
        values[p.name] = tuple(_Subgraph(frame, told, f"{p.name}[{i}]", cast("Variable", v)) for i, v in many)
    return values


def _seen(frame: Frame, parameter: Parameter, given: object) -> object:
    """What a parameter's variable stands for."""
    if parameter.kind is Kind.OPERAND:
        return frame.value(given)
    if parameter.kind is Kind.OPTION:
        return frame.option(given)
    if parameter.kind is Kind.SUBGRAPHS:
        return tuple(map(frame.callee, frame.items(given)))
    return frame.callee(given)


def _write(frame: Frame, op: OpSpec, values: Mapping[str, object], recording: Recording) -> Variable:
    graphs: list[GraphModule] = []
    names: dict[GraphModule, str] = {}
    for p in op.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS):
        many = values[p.name] if p.kind is Kind.SUBGRAPHS else (values[p.name],)
        for subgraph, variants in zip(
            cast("Sequence[_Subgraph]", many), recording.layout.subgraphs[p.name], strict=True
        ):
            for variant in variants:
                graphs.append(subgraph.close(recording.graphs[variant.graph], variant.metas))
                names[graphs[-1]] = f"{op.name}_{p.name}"
    keywords = {**recording.options, layout.KEYWORD: recording.layout.dumps()}
    leaves, tree = trees.flatten(recording.result)
    places = [leaf.index if isinstance(leaf, Slot) else (leaf,) for leaf in leaves]
    return frame.emit(names, graphs, recording.inputs, keywords, places, tree)
