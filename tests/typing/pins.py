"""What mypy tells users of hopkit. Nothing here runs: ``mypy --strict`` reads it, and an ignore that is not needed any
more is an error there, so each ``type: ignore`` below pins a mistake that mypy must find."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import assert_type

import hopkit
from hopkit.extend import Call
from hopkit.extend.functionalize import Functionalizer


@hopkit.define("typed_twice")
def twice(body: hopkit.Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
    """A bare ``Subgraph`` gives a tensor, so this body type-checks under strict."""
    return scale * body(body(x))


@hopkit.define("typed_split")
def split(body: hopkit.Subgraph[tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    """A subgraph with another result says so."""
    return body(x)


def calls(x: Tensor, w: Tensor) -> None:
    """An op keeps its author's signature."""
    assert_type(twice(torch.sin, x), Tensor)
    assert_type(twice(lambda y: y * w, x, scale=2.0), Tensor)
    assert_type(twice(torch.nn.Linear(2, 2), x), Tensor)
    assert_type(split(lambda y: (y, y), x), tuple[Tensor, Tensor])
    twice(torch.sin)  # type: ignore[call-arg] # an operand is missing
    twice(torch.sin, x, scale="2")  # type: ignore[arg-type] # an option of another type
    twice(3, x)  # type: ignore[arg-type] # a subgraph that is no callable


@twice.rule("device", device="cuda")
def twice_on_cuda(body: hopkit.Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
    """A device rule has the body's signature."""
    return scale * body(body(x))


@twice.rule("fake")  # type: ignore[arg-type] # the option is missing
def twice_without_scale(body: hopkit.Subgraph, x: Tensor) -> Tensor:
    """Not the body's signature."""
    return torch.empty_like(x)


@twice.rule("autograd")
class TwiceVjp:
    """A derivative written by hand."""

    @staticmethod
    def forward(body: hopkit.Subgraph, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, object]:
        """The result, and what backward needs."""
        return scale * body(body(x)), x

    @staticmethod
    def backward(saved: object, *gradients: Tensor | None) -> Sequence[Tensor | None]:
        """One gradient per operand."""
        return gradients


@twice.rule("functionalize")
def functionalized(layer: Functionalizer, call: Call) -> object:
    """A rule on calls."""
    return layer.wrap_tensors(call.inputs)


@twice.rule("proxy")  # type: ignore[arg-type] # the tracer is missing
def recorded(call: Call) -> object:
    """Not the protocol of a proxy rule."""
    return call()
