"""``associative_scan``: what a function makes of the beginnings of a sequence, in a logarithm of its length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, cast

import torch

import hopkit
from hopkit.extend.body import flatten, leaves, own, unflatten
from hopkit_controlflow.agreement import alike, called, shapes
from hopkit_controlflow.sequences import Along

NAME = "controlflow_associative_scan"
START = "a slice of 'xs' is"

Mode = Literal["pointwise", "generic"]
X = TypeVar("X")


def samples() -> list[hopkit.Sample]:
    """Calls that ``hopkit check controlflow_associative_scan`` makes."""
    x = torch.linspace(-1, 1, 15).reshape(5, 3)
    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()

    def linear(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"by": a["by"] * b["by"], "plus": a["plus"] * b["by"] + b["plus"]}

    return [
        hopkit.Sample((torch.add, x, 0), name="sums"),
        hopkit.Sample((lambda a, b: a * b * weight, x, 0), {"reverse": True}, "captures"),
        hopkit.Sample((linear, {"by": x, "plus": x + 1}, 1), name="pytree"),
        hopkit.Sample((torch.add, x[:0], 0), name="no steps"),
    ]


def _abstract(
    combine_fn: Callable[..., X], xs: X, dim: int, reverse: bool = False, combine_mode: Mode = "pointwise"
) -> X:
    along = Along(NAME, "xs", xs, dim)
    _combined(combine_fn, along.example(), along.example())
    return shapes(xs)


def _combined(combine_fn: Callable[..., X], a: X, b: X) -> X:
    return alike(NAME, "combine_fn", called(NAME, "combine_fn", combine_fn, a, b), START, a)


@hopkit.define(NAME, abstract=_abstract, samples=samples)
def associative_scan(
    combine_fn: Callable[..., X], xs: X, dim: int, reverse: bool = False, combine_mode: Mode = "pointwise"
) -> X:
    """Slice i is ``combine_fn`` of slice i - 1 of the result and slice i of ``xs``; slice 0 is that of ``xs``.

    It is called on many pairs at once (``torch.vmap``), about twice log2 of the length. Where it is not associative, in
    floating point say, the order shows.

    Args:
        combine_fn: Of two slices, one of the same structure, shapes, dtypes and devices.
        xs: A pytree of tensors of the same size along ``dim``; may be empty there.
        dim: The dimension that is gone along.
        reverse: From the last slice to the first.
        combine_mode: As in torch, which needs to know. Here it changes nothing.

    Raises:
        hopkit.CallError: ``xs`` are of different lengths, or have no such dimension.
        hopkit.SubgraphError: ``combine_fn`` gives something else than a slice, or writes to one.
    """
    dim = Along(NAME, "xs", xs, dim).dim

    def combine(a: X, b: X) -> X:
        return _combined(combine_fn, a, b)

    def both(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
        # ``combine_fn`` sees single slices, and so one graph of it does for all lengths.
        pairs = torch.vmap(combine, randomness="different")(*(cast("X", unflatten(x, tree)) for x in (a, b)))
        return cast("list[torch.Tensor]", leaves(pairs))

    def beginnings(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        length = parts[0].shape[0]
        if length < 2:
            return parts
        odd = beginnings(both([x[:-1:2] for x in parts], [x[1::2] for x in parts]))
        if length == 2:
            return [torch.cat([x[:1], y]) for x, y in zip(parts, odd, strict=True)]
        before = [x[: (length - 1) // 2] for x in odd]
        after = both(before, [x[2::2] for x in parts])
        return [_woven(*each) for each in zip(parts, odd, before, after, strict=True)]

    found, tree = flatten(xs)
    parts = [cast("torch.Tensor", x).movedim(dim, 0) for x in found]
    results = beginnings([x.flip(0) for x in parts] if reverse else parts)
    results = [(x.flip(0) if reverse else x).movedim(0, dim) for x in results]
    return own(cast("X", unflatten(results, tree)), [xs])


def _woven(first: torch.Tensor, odd: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return torch.cat([first[:1], torch.stack([before, after], 1).flatten(0, 1), odd[len(after) :]])
