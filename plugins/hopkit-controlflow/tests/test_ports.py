"""Ops of kinds that other projects wrote by hand for every mode, each in at most 40 lines."""

from __future__ import annotations

import inspect
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit.extend import Call
from hopkit.extend.body import leaves
from hopkit.extend.inductor import inline
from hopkit.testing import check

X = torch.linspace(-1, 1, 24).reshape(6, 4)
W = torch.linspace(0.5, 1.5, 4).requires_grad_()


Tensors = tuple[Tensor, ...]
Found = tuple[Tensors, Tensors, Tensors]
Step = hopkit.Subgraph[tuple[Tensors, Tensors]]

STATES = (torch.zeros(4), torch.full((4,), 0.5))


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


def define_loop_for() -> Any:
    def abstract(trips: Tensor, body: hopkit.Subgraph[Tensors], inputs: Tensors, *, dim: int = 0) -> Tensors:
        parts, count = body(trips, *inputs), cast("int", trips.item())
        return tuple(t.new_empty((*t.shape[:dim], count * t.shape[dim], *t.shape[dim + 1 :])) for t in parts)

    @hopkit.define(
        "port_loop_for",
        abstract=abstract,
        samples=lambda: [
            hopkit.Sample((torch.tensor(3), lambda i, x: (x * W + i, x[:2].sum(0, keepdim=True)), (X,)), {}, "capture"),
            hopkit.Sample((torch.tensor(2), lambda i, x, y: ((x @ y.t()).sin() + i,), (X, X + 1)), {"dim": 1}, "wide"),
            hopkit.Sample((torch.tensor(0), lambda i, x: (x * W + i,), (X,)), {}, "no trips"),
        ],
    )
    def loop_for(trips: Tensor, body: hopkit.Subgraph[Tensors], inputs: Tensors, *, dim: int = 0) -> Tensors:
        """``body(i, *inputs)`` for every ``i`` below ``trips``: each of what it gives, concatenated along ``dim``."""
        parts = [body(torch.tensor(i), *inputs) for i in range(int(trips))]
        parts = parts or [tuple(t.narrow(dim, 0, 0) for t in body(torch.tensor(0), *inputs))]
        return tuple(torch.cat(many, dim) for many in zip(*parts, strict=True))

    return loop_for


def define_recurrent() -> Any:
    def abstract(
        step: Step, xs: Tensors, states: Tensors, static: Tensors = (), *, keep: tuple[int, ...] = ()
    ) -> Found:
        ys, states = step(tuple(x[0] for x in xs), states, static)
        kept = [states[i] for i in keep]
        rooms = [t.new_empty((xs[0].shape[0], *t.shape)) for t in (*ys, *kept)]
        return tuple(rooms[: len(ys)]), tuple(map(torch.empty_like, states)), tuple(rooms[len(ys) :])

    @hopkit.define(
        "port_recurrent",
        abstract=abstract,
        samples=lambda: [
            hopkit.Sample((_neuron, (X, X.cos()), STATES, (W,)), {"keep": (0,)}, "one kept"),
            hopkit.Sample((lambda x, s, _: ((x[0] + s[0] * W,), (x[0] * s[0],)), (X,), STATES[:1]), {}, "capture"),
        ],
    )
    def recurrent(
        step: Step, xs: Tensors, states: Tensors, static: Tensors = (), *, keep: tuple[int, ...] = ()
    ) -> Found:
        """``ys, states = step(x, states, static)`` along ``xs``: all ``ys``, the last states, and those kept."""
        rows = []
        for parts in zip(*(x.unbind() for x in xs), strict=True):
            ys, states = step(parts, states, static)
            rows.append((*ys, *(states[i] for i in keep)))
        stacks = [torch.stack(row) for row in zip(*rows, strict=True)]
        count = len(stacks) - len(keep)
        return tuple(stacks[:count]), tuple(map(torch.clone, states)), tuple(stacks[count:])

    return recurrent


def _neuron(x: Tensors, states: Tensors, static: Tensors) -> tuple[Tensors, Tensors]:
    """One that leaks and is reset by what it gives, with a threshold that adapts."""
    (current, gate), (v, threshold), (leak,) = x, states, static
    v = v + (current * gate - v) * leak.sigmoid()
    spike = (4 * (v - threshold)).sigmoid()
    return (spike, v.sum()), (v * (1 - spike), threshold * 0.9 + spike)


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


@pytest.fixture
def loop_for() -> Iterator[Any]:
    op = define_loop_for()
    yield op
    hopkit.undefine(op)


@pytest.fixture
def recurrent() -> Iterator[Any]:
    op = define_recurrent()
    yield op
    hopkit.undefine(op)


@pytest.mark.parametrize("define", [define_tile_map, define_kernel_wrapper, define_loop_for, define_recurrent])
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


Function = Callable[..., Any]


def slopes(run: Function, *args: Tensor) -> Any:
    args = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in args)
    found = run(*args)
    by = [t for t in args if t.requires_grad]
    total = torch.stack([t.cos().sum() for t in leaves(found)]).sum()  # type: ignore[attr-defined]
    return found, torch.autograd.grad(total, by, allow_unused=True, materialize_grads=True)


def exported(run: Function, inputs: Tensors, sizes: object, *, strict: bool) -> Function:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> object:
            return run(*inputs)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(), inputs, strict=strict, dynamic_shapes=(sizes,)), file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("fixture", ["loop_for", "recurrent"])
def test_a_loop_is_right_in_every_mode(fixture: str, request: pytest.FixtureRequest) -> None:
    report = check(request.getfixturevalue(fixture))
    assert report.ok, str(report)
    assert not [cell for cell in report.cells if cell.verdict == "refused"], str(report)


@pytest.mark.parametrize("how", ["eager", "make_fx", "aot_eager", "inductor", "export", "strict export"])
def test_outputs_are_concatenated_as_often_as_a_tensor_says(loop_for: Any, how: str) -> None:
    torch.compiler.reset()

    def run(trips: Tensor, x: Tensor, w: Tensor) -> Any:
        return loop_for(trips, lambda i, x: (x * w + i, x[:2].sin()), (x,))

    def plain(trips: Tensor, x: Tensor, w: Tensor) -> Any:
        count = int(trips)
        parts = [(x * w + i, x[:2].sin()) for i in range(count)] or [(x[:0] * w, x[:0].sin())]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    inputs, function = (torch.tensor(3), X, W.detach()), cast("Function", run)
    if how == "make_fx":
        function = make_fx(lambda *t: run(*t))(*inputs)
    if how in ("aot_eager", "inductor"):
        function = torch.compile(run, backend=how, fullgraph=True)
    if "export" in how:
        rows = torch.export.Dim.DYNAMIC
        function = exported(run, inputs, (None, {0: rows}, None), strict=how.startswith("strict"))
        longer = torch.linspace(-1, 1, 36).reshape(9, 4)
        torch.testing.assert_close(function(torch.tensor(4), longer, W), plain(torch.tensor(4), longer, W))
    for trips in map(torch.tensor, (3, 0, 1, 5)):
        torch.testing.assert_close(slopes(function, trips, *inputs[1:]), slopes(plain, trips, *inputs[1:]))


@pytest.mark.parametrize(
    ("how", "keep"),
    [
        *itertools.product(["eager", "make_fx", "aot_eager", "export", "strict export"], [(), (1,), (1, 0)]),
        ("inductor", (1, 0)),
    ],
)
def test_states_are_carried_and_kept_where_asked(recurrent: Any, how: str, keep: tuple[int, ...]) -> None:
    torch.compiler.reset()

    def run(x: Tensor, gate: Tensor, v: Tensor, threshold: Tensor, leak: Tensor) -> Any:
        return recurrent(_neuron, (x, gate), (v, threshold), (leak,), keep=keep)

    def plain(x: Tensor, gate: Tensor, v: Tensor, threshold: Tensor, leak: Tensor) -> Any:
        states, rows = [(v, threshold)], []
        for parts in zip(x, gate, strict=True):
            ys, after = _neuron(parts, states[-1], (leak,))
            rows.append(ys)
            states.append(cast("tuple[Tensor, Tensor]", after))
        stacks = tuple(map(torch.stack, zip(*rows, strict=True)))
        return stacks, states[-1], tuple(torch.stack([state[i] for state in states[1:]]) for i in keep)

    inputs, function = (X, X.cos(), *STATES, W.detach()), cast("Function", run)
    longer = (torch.linspace(-1, 1, 36).reshape(9, 4), torch.ones(9, 4), *inputs[2:])
    if how == "make_fx":
        function = make_fx(lambda *t: run(*t), tracing_mode="symbolic")(*inputs)
        assert len([name for name, _ in function.named_children() if name.startswith("port_recurrent")]) == 1
    if how in ("aot_eager", "inductor"):
        function = torch.compile(run, backend=how, fullgraph=True, dynamic=True)
    if "export" in how:
        rows = {0: torch.export.Dim.DYNAMIC}
        function = exported(run, inputs, (rows, rows, None, None, None), strict=how.startswith("strict"))
    for given in (inputs, longer):
        torch.testing.assert_close(slopes(function, *given), slopes(plain, *given))
