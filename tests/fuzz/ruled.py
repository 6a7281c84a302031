"""Rules as an author writes them, for any op: each says by other means what the body says, so nothing may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

import hopkit
from hopkit._torch import trees

F = TypeVar("F")
Body = Callable[..., Any]


def taken_apart(value: object) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of a pytree, and what makes one like it of others."""
    leaves, tree = trees.flatten(value)
    return leaves, lambda others: trees.unflatten(others, tree)


def ruled(*modes: str) -> Callable[[F], F]:
    """A decorator: the op gets rules of its own for these modes. A body alone stays as it is."""

    def decorate(op: F) -> F:
        if isinstance(op, hopkit.Op):
            for mode in modes:
                rule: Any = RULES[mode](by_position(op.spec))
                op.rule(mode)(rule)
        return op

    return decorate


def by_position(spec: hopkit.OpSpec) -> Body:
    """The body, as a function of every argument by position: ``times`` is the last."""
    return lambda *args: spec.body(*args[:-1], times=args[-1])


def told_of(args: Sequence[Any], told: Sequence[Any]) -> list[Any]:
    """What is told of every leaf of ``args``; a None is that of all leaves of an argument."""
    pairs = zip(args, told, strict=True)
    return [
        leaf for arg, one in pairs for leaf in ([None] * len(trees.leaves(arg)) if one is None else trees.leaves(one))
    ]


def kernel(body: Body) -> Body:
    return lambda *args, times: body(*args, times)


def pushed(body: Body) -> Body:
    """The tangents are those of ``torch.func.jvp``."""

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        leaves, again = taken_apart(tuple(primals))
        known = told_of(primals, tangents)
        moved = [i for i, tangent in enumerate(known) if isinstance(tangent, Tensor)]
        seen: list[Any] = []

        def run(*some: Tensor) -> tuple[Tensor, ...]:
            changed = dict(zip(moved, some, strict=True))
            seen[:] = taken_apart(body(*again([changed.get(i, v) for i, v in enumerate(leaves)])))
            return tuple(v for v in seen[0] if isinstance(v, Tensor))

        outputs, found = torch.func.jvp(run, tuple(leaves[i] for i in moved), tuple(known[i] for i in moved))[:2]
        values, like = seen
        told, moves = iter(outputs), iter(found)
        out = [next(told) if isinstance(v, Tensor) else v for v in values]
        out_tangents = [_floating(v, next(moves)) if isinstance(v, Tensor) else None for v in values]
        return like(out), like(out_tangents)

    return rule


def _floating(value: Tensor, tangent: Tensor) -> Tensor | None:
    return tangent if value.is_floating_point() else None


def looped(body: Body) -> Body:
    """A batch is one item after the other."""

    def rule(batch: Any, in_dims: Sequence[Any], *args: Any, times: int) -> tuple[Any, Any]:
        leaves, again = taken_apart((*args, times))
        dims = told_of((*args, times), in_dims)
        many = [dim if isinstance(v, Tensor) else None for v, dim in zip(leaves, dims, strict=True)]
        items = []
        for i in range(batch.batch_size):
            item = [v if dim is None else v.select(dim, i) for v, dim in zip(leaves, many, strict=True)]
            items.append(body(*again(item)))
        columns: list[Any] = list(zip(*map(trees.leaves, items), strict=True))
        _, like = taken_apart(items[0])
        out = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
        return like(out), like([0 if isinstance(v, Tensor) else None for v in out])

    return rule


def paired(body: Body) -> Any:
    """The derivative is that of ``torch.func.vjp``, by what forward was given."""

    def forward(*args: Any, times: int) -> tuple[Any, Any]:
        return body(*args, times), (args, times)

    def backward(saved: Any, *gradients: Tensor | None) -> list[Tensor | None]:
        args, times = saved
        leaves, again = taken_apart(args)
        tensors = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
        wanted = [i for i in tensors if leaves[i].is_floating_point()]

        def run(*some: Tensor) -> list[Tensor]:
            changed = dict(zip(wanted, some, strict=True))
            result = body(*again([changed.get(i, v) for i, v in enumerate(leaves)]), times)
            outputs = [v for v in trees.leaves(result) if isinstance(v, Tensor)]
            return [v for v, g in zip(outputs, gradients, strict=True) if g is not None]

        pull = torch.func.vjp(run, *(leaves[i] for i in wanted))[1]
        found = dict(zip(wanted, pull([g for g in gradients if g is not None]), strict=True))
        return [found.get(i) for i in tensors]

    return SimpleNamespace(forward=forward, backward=backward)


RULES: dict[str, Callable[[Body], Any]] = {"device": kernel, "jvp": pushed, "vmap": looped, "autograd": paired}
