"""Ops of kinds that other projects wrote by hand for every mode, each in at most 40 lines."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit.extend import Call
from hopkit.extend.inductor import inline
from hopkit.testing import check

X = torch.linspace(-1, 1, 24).reshape(6, 4)
W = torch.linspace(0.5, 1.5, 4).requires_grad_()


def define_tile_map() -> Any:
    lowerings: list[str] = []

    @hopkit.define(
        "port_tile_map",
        samples=lambda: [
            hopkit.Sample((lambda tile, start: tile * W + start, X), {"tile": 2}, "capture"),
            hopkit.Sample((lambda tile, start: tile.cumsum(0) - start, X), {"tile": 3}, "across a tile"),
        ],
    )
    def tile_map(callback: hopkit.Subgraph, x: Tensor, *, tile: int) -> Tensor:
        """``callback(tile, where it starts)``, for every ``tile`` rows."""
        if x.shape[0] % tile:
            raise hopkit.CallError(
                "port_tile_map() argument 'x'",
                f"has {x.shape[0]} rows, and tiles have {tile}",
                why="the callback is compiled for one size of tiles",
                todo="Pad it",
            )
        starts = torch.arange(0, x.shape[0], tile).unbind()
        return torch.cat([callback(part, start) for part, start in zip(x.split(tile), starts, strict=True)])

    @tile_map.rule("inductor")
    def in_inductor(call: Call) -> object:
        """Where rows are few, Inductor gets the tiles one by one; a backend of tiles would write its loop here."""
        lowerings.append(call.op.name)
        return inline(call)

    return tile_map, lowerings


def define_kernel_wrapper() -> Any:
    @hopkit.define(
        "port_kernel_wrapper",
        mutates=("out", "count"),
        samples=lambda: [
            hopkit.Sample((_kernel, (X, W.detach()), torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)), {"grid": 6})
        ],
    )
    def wrapper(
        kernel: hopkit.Subgraph[None], inputs: tuple[Tensor, ...], out: Tensor, count: Tensor, *, grid: int
    ) -> None:
        """Launch ``kernel(program, inputs, out, count)`` for every program of the grid. It writes to the last two."""
        for program in range(grid):
            kernel(torch.tensor(program), inputs, out, count)

    return wrapper


def _kernel(program: Tensor, inputs: tuple[Tensor, ...], out: Tensor, count: Tensor) -> None:
    x, w = inputs
    row = x.index_select(0, program.reshape(1))
    out.index_copy_(0, program.reshape(1), row.sin() * w)
    count.index_add_(0, program.reshape(1), torch.ones(1, dtype=torch.int64))


@pytest.fixture
def tile_map() -> Iterator[Any]:
    op, lowerings = define_tile_map()
    yield op, lowerings
    hopkit.undefine(op)


@pytest.fixture
def wrapper() -> Iterator[Any]:
    op = define_kernel_wrapper()
    yield op
    hopkit.undefine(op)


@pytest.mark.parametrize("define", [define_tile_map, define_kernel_wrapper])
def test_they_are_short(define: Any) -> None:
    assert len(inspect.getsource(define).splitlines()) <= 40


def test_a_tile_map_is_right_in_every_mode(tile_map: Any) -> None:
    op, lowerings = tile_map
    report = check(op)
    assert report.ok, str(report)
    assert lowerings


@pytest.mark.filterwarnings(
    "ignore:Please add support for subgraph args"
)  # torch's Inductor, of any op it does not know
def test_a_tile_map_has_one_graph_for_all_tiles_and_its_own_lowering(tile_map: Any) -> None:
    op, lowerings = tile_map

    def function(x: Tensor) -> Any:
        return op(lambda tile, start: tile.sin() * W + start, x, tile=2)

    graph = make_fx(function)(X)
    assert len([name for name, _ in graph.named_children() if name.startswith("port_tile_map")]) == 1
    lowerings.clear()
    want = X.sin() * W + torch.tensor([0, 0, 2, 2, 4, 4])[:, None]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(X), want)
    assert lowerings == ["port_tile_map"]
    with pytest.raises(hopkit.CallError, match="6 rows, and tiles have 4"):
        op(lambda tile, start: tile, X, tile=4)


def test_a_kernel_wrapper_is_right_in_every_mode(wrapper: Any) -> None:
    report = check(wrapper)
    assert report.ok, str(report)


@pytest.mark.parametrize("mode", ["eager", "make_fx", "aot_eager", "inductor"])
def test_a_kernel_wrapper_writes_to_what_it_declares(wrapper: Any, mode: str) -> None:
    def function(x: Tensor, out: Tensor, count: Tensor) -> Tensor:
        wrapper(_kernel, (x, W.detach()), out, count, grid=6)
        return out * 2

    def buffers() -> tuple[Tensor, Tensor]:
        return torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)

    runs: dict[str, Any] = {
        "eager": function,
        "make_fx": make_fx(function)(X + 1, *buffers()) if mode == "make_fx" else None,
        "aot_eager": torch.compile(function, backend="aot_eager", fullgraph=True),
        "inductor": torch.compile(function, fullgraph=True),
    }
    out, count = buffers()
    result = runs[mode](X, out, count)
    torch.testing.assert_close(out, X.sin() * W.detach())
    torch.testing.assert_close(result, 2 * out)
    assert torch.equal(count, torch.ones(6, dtype=torch.int64))
