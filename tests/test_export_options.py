"""torch.export and options: each kind comes back as it was, and what cannot be written is named at export."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import LayoutError, Op, Subgraph
from tests.recording import nodes, same
from tests.saving import again

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 4)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float
    axes: tuple[int, ...] = ()
    color: Color = Color.RED


class Call(torch.nn.Module):
    """One call with an option."""

    def __init__(self, op: Op[..., Tensor], option: object) -> None:
        super().__init__()
        self.op, self.option = op, option

    def forward(self, x: Tensor) -> Tensor:
        return self.op(torch.sin, x, option=self.option)


def define(annotation: object) -> tuple[Op[..., Tensor], list[object]]:
    """An op with an option, and what it has received."""
    received: list[object] = []

    def body(body: Subgraph, x: Tensor, *, option: Any) -> Tensor:
        received.append(option)
        return body(x)

    body.__annotations__["option"] = annotation
    return hopkit.define("t_option")(body), received


OPTIONS: list[tuple[object, object]] = [
    (int, 3),
    (int, -(2**63)),
    (float, 0.1),
    (float, math.nan),
    (float, math.inf),
    (float, -math.inf),
    (float, -0.0),
    (float, 5e-324),
    (bool, False),
    (str, 'a "quoted"\nline, \u00e9'),
    (str, ""),
    (int | None, None),
    (torch.dtype, torch.bfloat16),
    (torch.device, torch.device("cuda:1")),
    (complex, 1 + 2j),
    (bytes, b"\x00\xff"),
    (Color, Color.BLUE),
    (Level, Level.HIGH),
    (tuple[int, ...], ()),
    (tuple[int, ...], (1, 2)),
    (tuple[float, ...], (math.nan, math.inf, 1.5)),
    (tuple[tuple[int, float], ...], ((1, -math.inf), (2, 0.1))),
    (tuple[str, None, bool], ("a", None, True)),
    (tuple[torch.dtype, ...], (torch.float16, torch.int64)),
    (tuple[Color, ...], (Color.RED, Color.BLUE)),
]


DATACLASSES: list[tuple[object, object]] = [
    (Settings, Settings(0.5, (1, 2), Color.BLUE)),
    (tuple[Settings, ...], (Settings(math.inf), Settings(1.0, (3,)))),
]
EVERY = [(*case, strict) for case in OPTIONS + DATACLASSES for strict in (False, True)]


@pytest.mark.parametrize(
    ("annotation", "option", "strict"), EVERY, ids=[f"{option}-{strict}" for _, option, strict in EVERY]
)
def test_an_option_goes_round(annotation: object, option: object, strict: bool) -> None:
    op, received = define(annotation)
    program = again(torch.export.export(Call(op, option), (X,), strict=strict))
    assert nodes(program.graph_module, op) == 1
    received.clear()
    same(program.module()(X), X.sin())
    assert [(type(got), repr(got)) for got in received] == [(type(option), repr(option))]


def local_enum() -> tuple[object, object]:
    class Local(enum.Enum):
        A = 1

    return Local, Local.A


def local_dataclass() -> tuple[object, object]:
    @dataclasses.dataclass(frozen=True)
    class Local:
        a: int = 1

    return Local, Local()


@pytest.mark.parametrize("made", [local_enum, local_dataclass])
def test_an_option_that_no_file_can_hold_is_named_at_export(made: Any) -> None:
    annotation, option = made()
    op, _ = define(annotation)
    with pytest.raises(LayoutError, match=r"t_option\(\) argument 'option' holds class .*Local.*top of a module"):
        torch.export.export(Call(op, option), (X,), strict=False)
    hopkit.undefine(op)
    good, _ = define(int)
    same(again(torch.export.export(Call(good, 2), (X,))).module()(X), X.sin())


def test_strict_export_names_it_in_dynamo_s_words() -> None:
    annotation, option = local_enum()
    op, _ = define(annotation)
    with pytest.raises(RuntimeError, match=r"t_option\(\) argument 'option' holds class .*Local"):
        torch.export.export(Call(op, option), (X,), strict=True)
