"""Rules for vmap and jvp that see the author's arguments, as an author would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from hopkit._torch import trees
from hopkit._torch.levels import Batch, Tangents, duals_shared
from hopkit.call import Call
from hopkit.codec import Slot
from hopkit.errors import RuleError
from hopkit.rule import Decline
from hopkit.spec import Kind
from hopkit.transform import NOTHING, Flat, typed, vmap

Rule = Callable[..., object]


def batched(rule: Rule, batch: Batch, call: Call) -> object:
    """The outputs of ``call``, as a vmap rule on the author's arguments gives them."""
    values, dims = batch.unwrap(call.inputs)
    if call.transformed:
        raise Decline("it is written for the op, and this is a transform of it")
    _check(call, [i for i, dim in enumerate(dims) if dim is not None], "a batched tensor")
    in_dims = _arguments(call, _by_parameter(call, dims))
    args, kwargs = call.replace(inputs=values).arguments()
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
        return _chosen(call, "vmap", list(map(batch.wrap, leaves, cast("list[int | None]", given)))) or NOTHING


def pushed(rule: Rule, level: Tangents, call: Call) -> object:
    """The outputs of ``call`` with their tangents, as a jvp rule on the author's arguments gives them.

    Under `torch.vmap` it is asked about one item.
    """
    primals, tangents = level.unpack(call.inputs)
    batches, item = call.batches, call.item
    if batches is None:
        raise Decline("it is written for the op and batches of it, and this is another transform")
    if not tangents:
        raise Decline("nothing has a tangent, and the rule has nothing to tell of")
    _check(call, list(tangents), "a tensor with a tangent")
    told: list[bool] = []

    def run(values: Sequence[object]) -> tuple[object, ...]:
        known = dict(zip(tangents, values[len(primals) :], strict=True))
        given = [known.get(i) for i in range(len(primals))]
        arguments = _arguments(item, item.replace(inputs=values[: len(primals)]).values())
        out, out_tangents = _pair(item, "jvp", rule(arguments, _arguments(item, _by_parameter(item, given))))
        leaves, tree = trees.flatten(out)
        found = _chosen(item, "jvp", trees.like(out_tangents, tree, torch.Tensor))
        told[:] = [isinstance(tangent, torch.Tensor) for tangent in found]
        outputs = _chosen(item, "jvp", leaves)
        return (
            *outputs,
            *(typed(t, out) for t, out in zip(found, outputs, strict=True) if isinstance(t, torch.Tensor)),
        )

    mapped: Flat = run
    for dims, randomness in batches:
        mapped = vmap(mapped, (*dims, *(dims[i] for i in tangents)), randomness)
    with duals_shared(), level.lower():
        found = mapped([*primals, *tangents.values()])
    rest = iter(found[len(told) :])
    outputs = [i for i, is_told in enumerate(told) if is_told]
    return level.pack(found[: len(told)], {i: cast("torch.Tensor", next(rest)) for i in outputs}) or NOTHING


def _is_dim(dim: object, tensor: torch.Tensor) -> bool:
    return dim is None or (isinstance(dim, int) and -tensor.dim() <= dim < tensor.dim())


def _check(call: Call, concerned: Sequence[int], what: str) -> None:
    if any(i >= call.operands for i in concerned):
        raise Decline(f"a subgraph closes over {what}, which the author's arguments do not say")


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
