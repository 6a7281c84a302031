"""Ops of all three shapes, with samples, for the matrix and for whoever needs one."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import NamedTuple

import torch
from torch import Tensor

import hopkit
from hopkit import Op, Sample, Subgraph

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
SQUARE = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)
WEIGHT = torch.nn.Parameter(torch.linspace(0.5, 1.5, 9).reshape(3, 3))
SCALE = torch.tensor(1.5, requires_grad=True)


class Gate(torch.nn.Module):
    """A module with a parameter and a buffer."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.2, 1.0, 9).reshape(3, 3))
        self.register_buffer("shift", torch.linspace(0.0, 0.2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight + self.shift)

    def scaled(self, x: Tensor, by: Tensor) -> Tensor:
        return x * self.weight.sum() * by


GATE = Gate()

# single-call


@hopkit.define(
    "sample_region",
    samples=lambda: [
        Sample((lambda x: x @ WEIGHT, X), name="closure"),
        Sample((GATE, X), name="module"),
        Sample((GATE.scaled, X, X + 2), name="bound"),
        Sample((functools.partial(torch.mul, SCALE), X), name="partial"),
        Sample((torch.fx.symbolic_trace(GATE), X), name="graph"),
        Sample((lambda n, x: x * n, torch.arange(3), X), name="ints"),
        Sample((lambda x: x + 1, torch.tensor(2.0)), name="scalar"),
        Sample((torch.neg, torch.complex(X, X)), name="complex"),
    ],
)
def region(body: Subgraph, *xs: Tensor) -> Tensor:
    return body(*xs)


class Rounding(enum.Enum):
    """An option that is no number."""

    NONE = "none"
    DOWN = "down"


@hopkit.define(
    "sample_cast",
    samples=lambda: [
        Sample((torch.sin, X), {"scale": 0.5}, "scaled"),
        Sample((lambda x: x * SCALE, X.t()), {"dtype": torch.float64, "axes": (1, 0)}, "transposed"),
        Sample((torch.sin, X), {"scale": 3.0, "rounding": Rounding.DOWN}, "enum"),
        Sample((torch.sin, torch.zeros(0, 3)), name="empty"),
    ],
)
def cast(
    body: Subgraph,
    x: Tensor,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    axes: tuple[int, ...] = (0, 1),
    rounding: Rounding = Rounding.NONE,
) -> Tensor:
    y = scale * body(x.to(dtype)).permute(axes)
    return y.floor() if rounding is Rounding.DOWN else y.contiguous()


# composite


@hopkit.define(
    "sample_twice",
    samples=lambda: [
        Sample((torch.sin, X), name="sin"),
        Sample((lambda y: y @ WEIGHT, SQUARE), name="capture"),
        Sample((GATE, SQUARE.t()), {"scale": 0.5}, "module"),
        Sample((_again, X), name="nested"),
    ],
)
def twice(body: Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * body(body(x))


def _again(y: Tensor) -> Tensor:
    return twice(lambda z: z * SCALE, y) + y


@hopkit.define(
    "sample_scan",
    samples=lambda: [
        Sample((lambda h, x: (torch.tanh(h + x @ WEIGHT), h.sum()), torch.zeros(3), SQUARE), name="recurrent"),
        Sample((lambda h, x: (h + x, h * x), torch.tensor(0.5), X[:, 0]), name="strided"),
    ],
)
def scan(step: Subgraph[tuple[Tensor, Tensor]], carry: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for x in xs.unbind(0):
        carry, output = step(carry, x)
        outputs.append(output)
    return carry, torch.stack(outputs)


@hopkit.define(
    "sample_halving",
    samples=lambda: [
        Sample((torch.maximum, torch.arange(8.0).sub(3)), name="maximum"),
        Sample((lambda a, b: (a * b) @ WEIGHT, torch.ones(8, 3)), name="capture"),
    ],
)
def halving(combine: Subgraph, xs: Tensor) -> Tensor:
    while xs.shape[0] > 1:
        xs = combine(xs[0::2], xs[1::2])
    return xs[0].clone()


class Join(enum.Enum):
    """How `mix` joins its two branches."""

    ADD = "add"
    MULTIPLY = "multiply"


@hopkit.define(
    "sample_mix",
    samples=lambda: [
        Sample((torch.sin, torch.cos, X, X + 1), name="plain"),
        Sample((torch.sin, GATE, X, X + 1), name="add"),
        Sample((lambda x: x * SCALE, lambda y: y @ WEIGHT, X, X), {"scale": 3.0, "join": Join.MULTIPLY}, "shared"),
    ],
)
def mix(left: Subgraph, right: Subgraph, x: Tensor, y: Tensor, *, scale: float = 2.0, join: Join = Join.ADD) -> Tensor:
    a, b = left(x), right(y)
    return scale * (a + b if join is Join.ADD else a * b)


@hopkit.define(
    "sample_chain",
    samples=lambda: [
        Sample(((torch.sin, lambda y: y @ WEIGHT, GATE), X), name="three"),
        Sample(((torch.sin, torch.sin), X), name="same"),
    ],
)
def chain(stages: tuple[Subgraph, ...], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x) + x
    return x


class Pair(NamedTuple):
    """A named tuple of tensors."""

    first: Tensor
    second: Tensor


@dataclasses.dataclass
class State:
    """A dataclass that torch knows as a pytree."""

    value: Tensor
    count: int


torch.export.register_dataclass(State, serialized_type_name="tests.samples.State")


@hopkit.define(
    "sample_trees",
    samples=lambda: [
        Sample((_swap, {"pair": Pair(X, X + 1), "none": None, "power": 2}, State(X * 2, 3)), name="plain"),
        Sample((_step, {"pair": Pair(X, X + 1), "none": None, "power": 2}, State(X * 2, 3)), name="capture"),
    ],
)
def trees(body: Subgraph[Pair], tensors: dict[str, Pair | int | None], state: State) -> tuple[dict[str, object], State]:
    pair = body(tensors, state)
    return {"pair": pair, "none": tensors["none"], "number": state.count}, State(pair.first.sum(), state.count + 1)


def _step(tensors: dict[str, Pair], state: State) -> Pair:
    pair = tensors["pair"]
    return Pair(pair.first * state.value**2 * SCALE, pair.second + state.count)


def _swap(tensors: dict[str, Pair], state: State) -> Pair:
    return Pair(tensors["pair"].second * state.count, tensors["pair"].first + state.value)


@hopkit.define(
    "sample_reduced",
    samples=lambda: [
        Sample((torch.exp, X), name="exp"),
        Sample((lambda x: x @ WEIGHT, X), name="capture"),
    ],
)
def reduced(body: Subgraph, x: Tensor) -> Tensor:
    return body(x).sum(0) * x.mean()


# data-dependent


def _branches(use: Tensor, yes: Subgraph, no: Subgraph, x: Tensor) -> tuple[tuple[Tensor], tuple[Tensor]]:
    return (x,), (x,)


def _like(use: Tensor, yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@hopkit.define(
    "sample_branch",
    inputs=_branches,
    outputs=_like,
    samples=lambda: [
        Sample((torch.tensor(True), torch.sin, torch.cos, X), name="yes"),
        Sample((torch.tensor(-1.0), lambda y: y @ WEIGHT, lambda y: y * SCALE, X), name="captures"),
    ],
)
def branch(use: Tensor, yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
    return yes(x) if bool(use > 0) else no(x)


@hopkit.define(
    "sample_loop",
    inputs=lambda again, step, x: ((x,), (x,)),
    outputs=lambda again, step, x: torch.empty_like(x),
    samples=lambda: [
        Sample((lambda y: y.abs().sum() < 50, lambda y: y * 2 + 1, X), name="doubling"),
        Sample((lambda y: (y * SCALE).abs().sum() < 50, lambda y: y * SCALE + 1, X), name="captures"),
    ],
)
def loop(again: Subgraph, step: Subgraph, x: Tensor) -> Tensor:
    while bool(again(x)):
        x = step(x)
    return x.clone()


OPS: dict[str, Op[..., object]] = {
    op.spec.name.removeprefix("sample_"): op
    for op in (region, cast, twice, scan, halving, mix, chain, trees, reduced, branch, loop)
}
"""Every sample op, by a short name."""
