"""Sharding rules: the op runs once, on what each process has of its operands, and its outputs are put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.overrides import TorchFunctionMode

import hopkit
from hopkit.extend import CaptureError, Decline, Kind, RuleError
from hopkit.extend.mode import leaves, map_leaves
from hopkit_dtensor.local import Placements, enter, leave
from hopkit_dtensor.shape import if_even, if_uneven

ShardingRule: TypeAlias = Callable[..., "tuple[Sequence[Placements], Sequence[Placements]]"]
"""Takes the placements of every operand tensor, and those options that it names. Gives the placements that the op is to
be run on, one per operand tensor, and those that its outputs then have, one per output tensor."""

R = TypeVar("R", bound=ShardingRule)


def sharding(op: hopkit.Op[..., object]) -> Callable[[R], R]:
    """Declare how an op runs on DTensors: ``@hopkit_dtensor.sharding(op)``.

    Operands are redistributed as the rule says. The op runs once on the local tensors, where a DTensor that a subgraph
    closes over is gathered. What comes out becomes DTensors of the placements that the rule says. Whether the body
    allows that, its author knows: the rule is believed, as a derivative written by hand is.

    Raises:
        PluginError: This plugin is not registered with hopkit.
    """

    def attach(rule: R) -> R:
        def answer(entry: type[DTensor], /, *args: object, **kwargs: object) -> object:  # noqa: ARG001 - the mode's own
            return _run(op, rule, inspect.signature(op.spec.body).bind(*args, **kwargs))

        op.rule("dtensor")(answer)
        return rule

    return attach


def _run(op: hopkit.Op[..., object], rule: ShardingRule, call: inspect.BoundArguments) -> object:
    call.apply_defaults()
    given = {p.name: call.arguments[p.name] for p in op.spec.of_kind(Kind.OPERAND)}
    mesh, operands = _on_one_mesh(op, [leaf for leaf in leaves(given) if isinstance(leaf, torch.Tensor)])
    options = {p.name: call.arguments[p.name] for p in op.spec.of_kind(Kind.OPTION)}
    inputs, outputs = _plan(op, rule, mesh, operands, options)
    split = tuple(any(not p.is_replicate() for p in dim) for dim in zip(*inputs, *outputs, strict=True))

    local = [enter(whole, placements, split) for whole, placements in zip(operands, inputs, strict=True)]
    versions = [_version(tensor) for tensor in local]
    passed = iter(local)
    call.arguments.update(map_leaves(lambda v: next(passed) if isinstance(v, torch.Tensor) else v, given))
    with _Gathered(op, mesh, split) as captured:
        result = op(*call.args, **call.kwargs)
    if versions != [_version(tensor) for tensor in local] or captured.written():
        raise RuleError(
            f"op '{op.spec.name}'",
            "writes to an operand or a capture under its sharding rule",
            why="it would be written to what one process has, and not to the DTensor",
            todo="Give a new tensor instead, or run the body on the DTensors: `with hopkit.decompose(op):`",
        )

    found = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
    if len(found) != len(outputs):
        raise _wrong(op, f"gives placements for {len(outputs)} outputs, and the op gives {len(found)} tensors")
    # Where every process has equally much of the operands, it has so of the outputs.
    known = if_even if all(map(_is_even, local, inputs, operands)) else if_uneven

    def back(index: int) -> torch.Tensor:
        tensor = found[index]
        if isinstance(tensor, DTensor):  # a capture, as it came
            return tensor
        placements = _fitting(op, f"output {index}", outputs[index], mesh, tensor.ndim)
        shape = known(tensor, mesh, placements)
        if shape is None:
            raise _wrong(op, f"gives {placements} for output {index}, and what the processes have are no such shards")
        return leave(tensor, mesh, placements, split, shape)

    wrapped = iter([back(i) for i in range(len(found))])
    return map_leaves(lambda v: next(wrapped) if isinstance(v, torch.Tensor) else v, result)


def _is_even(local: torch.Tensor, placements: Placements, whole: DTensor) -> bool:
    return if_even(local, whole.device_mesh, placements) == whole.shape


def _on_one_mesh(op: hopkit.Op[..., object], operands: Sequence[torch.Tensor]) -> tuple[DeviceMesh, list[DTensor]]:
    mesh, *others = dict.fromkeys(x.device_mesh for x in operands if isinstance(x, DTensor))
    if others:
        raise hopkit.CallError(
            f"op '{op.spec.name}'",
            f"is called with DTensors on {1 + len(others)} meshes: {mesh}, {', '.join(map(str, others))}",
            why="its sharding rule is about one mesh",
            todo="Bring the operands onto one mesh",
        )
    if mesh.get_coordinate() is None:
        raise Decline("this process is not on the mesh, and has nothing of the operands")
    replicated = (Replicate(),) * mesh.ndim
    found: list[DTensor] = []
    for index, operand in enumerate(operands):
        if not isinstance(operand, DTensor):
            if operand.ndim:
                raise hopkit.CallError(
                    f"op '{op.spec.name}'",
                    f"is called with DTensors, and operand tensor {index} is a plain tensor of shape "
                    f"{tuple(operand.shape)}",
                    why="nobody can tell whether it is all of something or a shard of it",
                    todo="Say so with `torch.distributed.tensor.distribute_tensor` or `DTensor.from_local`",
                )
            operand = leave(operand, mesh, replicated, (False,) * mesh.ndim, operand.shape)  # a number, as torch has it
        found.append(operand)
    return mesh, found


def _plan(
    op: hopkit.Op[..., object],
    rule: ShardingRule,
    mesh: DeviceMesh,
    operands: Sequence[DTensor],
    options: Mapping[str, object],
) -> tuple[list[Placements], list[Placements]]:
    """What the rule says, checked."""
    signature = inspect.signature(rule)
    named = {name: value for name, value in options.items() if name in signature.parameters}
    given = [operand.placements for operand in operands]
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        raise _wrong(op, f"takes {signature}, and the op is called with {len(given)} operand tensors") from error
    answer: object = rule(*given, **named)
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise _wrong(op, f"gives {answer!r}, which is no pair (input placements, output placements)")
    inputs, outputs = map(list, answer)
    if len(inputs) != len(operands):
        raise _wrong(op, f"gives placements for {len(inputs)} operand tensors, and there are {len(operands)}")
    inputs = [
        _fitting(op, f"operand tensor {i}", placements, mesh, operand.ndim)
        for i, (placements, operand) in enumerate(zip(inputs, operands, strict=True))
    ]
    outputs = [_fitting(op, f"output {i}", placements, mesh) for i, placements in enumerate(outputs)]
    for i, (placements, operand) in enumerate(zip(inputs, operands, strict=True)):
        if any(p.is_partial() and p != q for p, q in zip(placements, operand.placements, strict=True)):
            found = f"asks for {placements} of operand tensor {i}, which is {operand.placements}"
            raise _wrong(op, found, "Ask for Partial() only where the operand is; Replicate() or Shard() always works")
    for dim in range(mesh.ndim):
        split = [any(not p[dim].is_replicate() for p in side) for side in (inputs, outputs)]
        if split == [False, True]:
            raise _wrong(op, f"splits an output along mesh dimension {dim}, where all operands are Replicate()")
        if split == [True, False]:
            raise _wrong(op, f"splits an operand along mesh dimension {dim}, where all outputs are Replicate()")
    return inputs, outputs


def _fitting(
    op: hopkit.Op[..., object], whose: str, given: object, mesh: DeviceMesh, ndim: int | None = None
) -> Placements:
    """The placements of a tensor, one per dimension of the mesh."""
    if not isinstance(given, (tuple, list)) or len(given) != mesh.ndim:
        count = f"{len(given)} placements" if isinstance(given, (tuple, list)) else repr(given)
        found = f"gives {count} for {whose}, and the mesh has {mesh.ndim} dimension{'s' * (mesh.ndim != 1)}"
        raise _wrong(op, found)
    placements: list[Placement] = []
    for placement in given:
        if type(placement) not in (Replicate, Shard) and placement != Partial():
            raise _wrong(op, f"gives {placement!r} for {whose}", "Use Shard(dim), Replicate() or Partial()")
        if isinstance(placement, Shard) and ndim is not None:
            if not -ndim <= placement.dim < ndim:
                raise _wrong(op, f"gives {placement!r} for {whose}, which has {ndim} dimensions")
            placement = Shard(placement.dim % ndim)
        placements.append(placement)
    return tuple(placements)


def _wrong(op: hopkit.Op[..., object], found: str, todo: str = "") -> RuleError:
    return RuleError(
        f"the sharding rule of op '{op.spec.name}'",
        found,
        why="the op cannot be run on shards by it",
        todo=todo or "Give (inputs, outputs): for every tensor a tuple of placements, one per dimension of the mesh",
    )


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to. Nobody counts that for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


class _Gathered(TorchFunctionMode):
    """Inside, a DTensor that a subgraph closes over is a plain tensor: all of it, gathered once."""

    def __init__(self, op: hopkit.Op[..., object], mesh: DeviceMesh, split: tuple[bool, ...]) -> None:
        super().__init__()
        self._op, self._mesh, self._split = op, mesh, split
        self._found: dict[int, tuple[DTensor, torch.Tensor, int]] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Called by torch for every function and method."""
        args, kwargs = map_leaves(self._gathered, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def _gathered(self, value: object) -> object:
        if not isinstance(value, DTensor):
            return value
        if value.device_mesh != self._mesh:
            raise CaptureError(
                f"op '{self._op.spec.name}'",
                f"has a subgraph that closes over a DTensor on {value.device_mesh}, and is called on {self._mesh}",
                why="its sharding rule is about one mesh",
                todo="Bring it onto the mesh of the operands",
            )
        if id(value) not in self._found:
            local = enter(value, (Replicate(),) * self._mesh.ndim, self._split)
            self._found[id(value)] = value, local, _version(local)
        return self._found[id(value)][1]

    def written(self) -> bool:
        """Whether anything was written to what was gathered."""
        return any(_version(local) != version for _, local, version in self._found.values())
