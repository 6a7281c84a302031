"""Control flow for programs: the ops of hopkit-controlflow, and what each means in plain PyTorch, also in a batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hopkit_controlflow
import torch
from torch import Tensor

import hopkit
from hopkit._torch import trees
from hopkit.kit import Kit

Run = Callable[..., Any]

STEPS = {
    "cond": "flow.cond({x}.sum() > 0, lambda z: z.sin() * {y}, lambda z: z.cos() * {y}, ({x},))",
    "switch": "flow.switch({x}.numel() % 3, (lambda z: z * {y}, lambda z: z + {y}, lambda z: z - {y}), {x})",
    "chosen": "flow.switch(({x}.sum() * 3).long(), (torch.sin, torch.tanh, lambda z: z.cos() * 2), {x})",
    "while": "flow.while_loop(lambda i, z: (i < 3) * (z.sum() < 2), lambda i, z: (i + 1, z + one({y}, z)), (0, {x}))",
    "fori": "flow.fori_loop(0, 3, lambda i, z: z * one({y}, z) + i, {x})",
    "until": "flow.fori_loop(0, ({x}.sum() > 0).long() + 1, lambda i, z: z * 2 - one({y}, z), {x})",
    "swept": "flow.scan(lambda c, z: (c + z, c * one({y}, z)), {x}[0], {x})",
    "back": "flow.scan(lambda c, z: (c * z, (c + z, z)), {x}[0], {x}, reverse=True)",
    "every": "flow.map(lambda z: z.sin() * {y}, {x})",
    "joined": "flow.associative_scan(lambda p, q: p * q, {x}, 0)",
    "summed": "flow.associative_scan(lambda p, q: [p[0] + q[0], p[1] + q[1]], [{x}, {x}.sin()], 0, reverse=True)",
    "region": "flow.region(lambda z: z.sin() * {y}, ({x},))",
    "kept": "flow.checkpoint(lambda z: z.sin() * {y}, {x})",
    "own": "flow.custom_vjp(lambda z: (z * 3, ()), lambda _, g: (g * 5,), ({x},))",
}
"""What a body or a subgraph may do besides: the last tensor of the result is the value."""


def step(text: str) -> str:
    """The code of a step; what has no rows to go along stays as it is."""
    along = text.startswith(("flow.scan", "flow.map", "flow.associative_scan"))
    return f"last({text}) if {{x}}.dim() and len({{x}}) else {{x}}" if along else f"last({text})"


def last(value: object) -> Tensor:
    """Of a result, the last tensor."""
    return trees.tensors(value)[-1]


def one(y: Tensor, z: Tensor) -> Tensor:
    """A number from ``y``, as a carry like ``z`` can take it."""
    return y.sum().to(z.dtype)


class _Own(torch.autograd.Function):
    """What torch cannot do of such a function, it cannot do of the op's body."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[object, ...], output: object) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 5

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * 5


def _ordered(items: Sequence[Any], reverse: bool) -> Sequence[Any]:
    return items[::-1] if reverse else items


class Plain:
    """The ops in plain PyTorch. What could happen is computed, and what does happen is taken: so in a batch, too."""

    @staticmethod
    def cond(pred: Any, true_fn: Run, false_fn: Run, operands: Sequence[Any]) -> Any:
        return torch.where(pred, true_fn(*operands), false_fn(*operands))

    @staticmethod
    def switch(index: Any, branches: Sequence[Run], *operands: Any) -> Any:
        results = [branch(*operands) for branch in branches]
        result = results[-1]
        for i in reversed(range(len(results) - 1)):
            result = torch.where(torch.as_tensor(index <= i), results[i], result)
        return result

    @staticmethod
    def while_loop(cond_fn: Run, body_fn: Run, state: Sequence[Any]) -> Any:
        state = [torch.as_tensor(value) for value in state]
        for _ in range(4):
            going, after = cond_fn(*state), body_fn(*state)
            state = [torch.where(going, new, old) for new, old in zip(after, state, strict=True)]
        return state

    @staticmethod
    def fori_loop(lower: int, upper: Any, body_fun: Run, value: Any) -> Any:
        for i in range(lower, 3):
            value = torch.where(torch.as_tensor(i < upper), body_fun(torch.tensor(i), value), value)
        return value

    @staticmethod
    def scan(combine_fn: Run, carry: Any, xs: Tensor, reverse: bool = False) -> Any:
        outputs = []
        for x in _ordered(xs.unbind(0), reverse):
            carry, output = combine_fn(carry, x)
            outputs.append(trees.leaves(output))
        return carry, [torch.stack(column) for column in zip(*_ordered(outputs, reverse), strict=True)]

    @staticmethod
    def map(f: Run, xs: Tensor) -> Tensor:
        return torch.stack([f(x) for x in xs.unbind(0)])

    @staticmethod
    def associative_scan(combine_fn: Run, xs: Any, dim: int, reverse: bool = False) -> Any:
        if isinstance(xs, Tensor):
            return Plain.associative_scan(lambda p, q: [combine_fn(p[0], q[0])], [xs], dim, reverse)
        rows = list(zip(*(x.unbind(dim) for x in xs), strict=True))
        found = list(itertools.accumulate(_ordered(rows, reverse), combine_fn))
        return [torch.stack(column, dim) for column in zip(*_ordered(found, reverse), strict=True)]

    @staticmethod
    def region(body: Run, operands: Sequence[Any]) -> Any:
        return body(*operands)

    @staticmethod
    def checkpoint(function: Run, *args: Any) -> Any:
        return function(*args)

    @staticmethod
    def custom_vjp(forward: Run, backward: Run, operands: Sequence[Any]) -> Any:
        return _Own.apply(*operands)  # type: ignore[no-untyped-call] # torch's own


@contextlib.contextmanager
def known(kit: Kit) -> Iterator[None]:
    """Inside, a fresh host knows the ops."""
    ops = {op.spec.name: op for op in vars(hopkit_controlflow).values() if isinstance(op, hopkit.Op)}
    kit.ops.update(ops)
    try:
        yield
    finally:
        for name in ops:
            del kit.ops[name]


def named(*, plain: bool) -> dict[str, object]:
    """What the code of steps refers to."""
    return {"flow": Plain if plain else hopkit_controlflow, "last": last, "one": one}
