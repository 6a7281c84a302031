"""Rules for vmap and jvp that see the author's arguments, as an author would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from hopkit._torch import trees
from hopkit._torch.levels import Batch, Tangents
from hopkit.call import Call
from hopkit.codec import Slot
from hopkit.errors import RuleError
from hopkit.rule import Decline
from hopkit.spec import Kind

Rule = Callable[..., object]


def batched(rule: Rule, batch: Batch, call: Call) -> object:
    """The outputs of ``call``, as a vmap rule on the author's arguments gives them."""
    values, dims = batch.unwrap(call.inputs)
    _check(call, [i for i, dim in enumerate(dims) if dim is not None], "a batched tensor")
    in_dims = _arguments(call, _by_parameter(call, dims))
    args, kwargs = call.op.arguments({**call.values(), **_operands(call, values)})
    with batch.lower():
        out, out_dims = _pair(call, "vmap", rule(batch, in_dims, *args, **kwargs))
        leaves, tree = trees.flatten(out)
        given = trees.like(out_dims, tree, int)
        for leaf, dim in zip(leaves, given, strict=True):
            if isinstance(leaf, torch.Tensor) and not _is_dim(dim, leaf):
                raise _wrong(
                    call,
                    "vmap",
                    f"gave {dim!r} for the batched dimension of {tuple(leaf.shape)}",
                    "give a dimension, or None",
                )
        return _chosen(call, "vmap", list(map(batch.wrap, leaves, cast("list[int | None]", given))))


def pushed(rule: Rule, level: Tangents, call: Call) -> object:
    """The outputs of ``call`` with their tangents, as a jvp rule on the author's arguments gives them."""
    primals, tangents = level.unpack(call.inputs)
    _check(call, list(tangents), "a tensor with a tangent")
    given = [tangents.get(i) for i in range(len(primals))]
    arguments = _arguments(call, {**call.values(), **_operands(call, primals)})
    with level.lower():
        out, out_tangents = _pair(call, "jvp", rule(arguments, _arguments(call, _by_parameter(call, given))))
        leaves, tree = trees.flatten(out)
        found = trees.like(out_tangents, tree, torch.Tensor)
    return level.pack(
        _chosen(call, "jvp", leaves),
        {i: t for i, t in enumerate(_chosen(call, "jvp", found)) if isinstance(t, torch.Tensor)},
    )


def _is_dim(dim: object, tensor: torch.Tensor) -> bool:
    return dim is None or (isinstance(dim, int) and -tensor.dim() <= dim < tensor.dim())


def _check(call: Call, concerned: Sequence[int], what: str) -> None:
    if call.transformed:
        raise Decline("it is written for the op, and this is a transform of it")
    if any(i >= call.operands for i in concerned):
        raise Decline(f"a subgraph closes over {what}, which the author's arguments do not say")


def _operands(call: Call, inputs: Sequence[object]) -> dict[str, object]:
    values = call.replace(inputs=inputs).values()
    return {p.name: values[p.name] for p in call.op.of_kind(Kind.OPERAND)}


def _by_parameter(call: Call, told: Sequence[object]) -> dict[str, object]:
    """What is told of every input, in the structure of the operands; None for whatever is no tensor."""
    assert call.layout is not None
    values = call.layout.values
    found: dict[str, object] = {p.name: None for p in call.op.parameters}
    for p in call.op.of_kind(Kind.OPERAND):
        found[p.name] = trees.map_leaves(lambda v: told[v.index] if isinstance(v, Slot) else None, values[p.name])
    for p in call.op.parameters:
        if p.variadic and found[p.name] is None:
            found[p.name] = (None,) * len(cast("tuple[object, ...]", call.values()[p.name]))
    return found


def _arguments(call: Call, values: Mapping[str, object]) -> tuple[object, ...]:
    args, kwargs = call.op.arguments(values)
    return (*args, *kwargs.values())


def _pair(call: Call, mode: str, given: object) -> tuple[object, object]:
    if isinstance(given, tuple) and len(given) == 2:
        return given
    second = {"vmap": "out_dims", "jvp": "out_tangents"}[mode]
    raise _wrong(call, mode, f"gave a {type(given).__qualname__}", f"return `(out, {second})`")


def _chosen(call: Call, mode: str, leaves: Sequence[object]) -> tuple[object, ...]:
    """Of the leaves of a result, those that the node gives."""
    assert call.layout is not None
    if len(leaves) != call.layout.leaves:
        found = f"gave a result of {len(leaves)} leaves where the body's has {call.layout.leaves}"
        raise _wrong(call, mode, found, "give a result of the body's structure")
    return tuple(leaves[i] for i in call.layout.outputs)


def _wrong(call: Call, mode: str, found: str, todo: str) -> RuleError:
    return RuleError(
        f"the {mode} rule of op '{call.op.name}'",
        found,
        why="the op's result is put together from it",
        todo=f"Let it {todo}",
    )
