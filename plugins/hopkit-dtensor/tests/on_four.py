"""The program of each of four processes: ``python on_four.py RANK DIRECTORY``. test_four_processes.py starts them.

Every check runs in all of them, over gloo, and is compared with one process. What failed is written down.
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import hopkit_dtensor
import pytest
import torch
import torch.distributed as dist
from hopkit_dtensor import Placements
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import linear

import hopkit
import hopkit_constgraph
from hopkit.extend import RuleError

WORLD = 4

Check = Callable[[DeviceMesh], None]
CHECKS: dict[str, Check] = {}


def on_four(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


# Ops, as their authors would write them

if "dtensor" not in {info.name for info in hopkit.plugins()}:  # this plugin is not installed
    hopkit.register(hopkit_dtensor, "dtensor")


@hopkit.define("dt_twice")
def twice(body: hopkit.Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * body(body(x))


Step = hopkit.Subgraph[dict[str, Tensor]]


@hopkit.define("dt_decay")
def decay(step: Step, state: dict[str, Tensor], *, steps: int) -> tuple[dict[str, Tensor], Tensor]:
    """A carried state, and its history."""
    history = []
    for _ in range(steps):
        state = step(state)
        history.append(state["a"].sum(-1))
    return state, torch.stack(history)


@hopkit.define("dt_mlp")
def mlp(up: hopkit.Subgraph, down: hopkit.Subgraph, x: Tensor) -> Tensor:
    return down(torch.tanh(up(x)))


@hopkit.define("dt_rows")
def rows(body: hopkit.Subgraph, x: Tensor, *, scale: float = 1.0) -> Tensor:
    """Row by row."""
    return scale * body(x)


@hopkit_dtensor.sharding(rows)
def _of_rows(x: Placements) -> tuple[list[Placements], list[Placements]]:
    split = (Shard(0),) * len(x)
    return [split], [split]


@hopkit.define("dt_gated")
def gated(act: hopkit.Subgraph, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A layer that is split by its hidden size."""
    return act(x @ up) @ down


@hopkit_dtensor.sharding(gated)
def _of_gated(x: Placements, up: Placements, down: Placements) -> tuple[list[Placements], list[Placements]]:
    """Split by hidden size along the last dimension of the mesh, and by rows of x along all others."""
    data, whole = (Shard(0),) * (len(x) - 1), (Replicate(),) * (len(x) - 1)
    return [(*data, Replicate()), (*whole, Shard(1)), (*whole, Shard(0))], [(*data, Partial())]


@hopkit.define("dt_two")
def two(body: hopkit.Subgraph, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """One output is of rows, the other of ``w`` alone."""
    return body(x @ w), (w * w).sum(0)


@hopkit_dtensor.sharding(two)
def _of_two(x: Placements, w: Placements) -> tuple[list[Placements], list[Placements]]:
    return [(Shard(0),), (Replicate(),)], [(Shard(0),), (Replicate(),)]


# Comparing


def values(*shapes: tuple[int, ...]) -> list[Tensor]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(sum(map(len, shapes)))
    return [torch.rand(shape, generator=generator, dtype=torch.float64) - 0.4 for shape in shapes]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([whole(value.sum()) for value in values]).sum()


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    torch.testing.assert_close([whole(v) for v in found], list(wanted))


def agrees(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], mesh: DeviceMesh, *placements: Sequence[Placement]
) -> Tensor:
    """Values, gradients and second derivatives of ``function``, on DTensors and on plain tensors."""
    plain = [t.clone().requires_grad_() for t in tensors]
    spread = [distribute_tensor(t, mesh, p).requires_grad_() for t, p in zip(tensors, placements, strict=True)]
    results: list[list[Tensor]] = []
    given = function(*spread)
    for inputs, output in ((plain, function(*plain)), (spread, given)):
        first = torch.autograd.grad((output * output).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(total(g * g * g for g in first), inputs, create_graph=True)
        third = torch.autograd.grad(total(g * g for g in second), inputs)
        results.append([output, *first, *second, *third])
    wanted, found = results
    same(found, [t.detach() for t in wanted])
    return given


# Without a rule: the body runs on the DTensors


@on_four
def placements_flow_through_a_body_and_what_it_closes_over(mesh: DeviceMesh) -> None:
    x, w = values((8, 4), (4, 4))
    plain = [t.clone().requires_grad_() for t in (x, w)]
    for placements in ([Shard(0), Replicate()], [Replicate(), Shard(1)], [Shard(1), Shard(0)]):
        spread = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip((x, w), placements, strict=True)]
        for a, b in (plain, spread):
            result = twice(lambda y, b=b: torch.tanh(y @ b), a, scale=2.0)
            assert isinstance(result, DTensor) == isinstance(a, DTensor)
            first = torch.autograd.grad((result * result).sum(), [a, b], create_graph=True)
            second = torch.autograd.grad(total(g * g for g in first), [a, b])
            if a is plain[0]:
                wanted = [result.detach(), *(g.detach() for g in first), *second]
            else:
                same([result, *first, *second], wanted)


@on_four
def placements_flow_through_pytrees_and_loops(mesh: DeviceMesh) -> None:
    a, b = values((8, 4), (8, 4))

    def run(a: Tensor, b: Tensor) -> list[Tensor]:
        def step(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"a": state["a"] * 0.5 + state["b"], "b": state["b"].sin()}

        state, history = decay(step, {"a": a, "b": b}, steps=3)
        loss = history.sum() + (state["a"] * state["b"]).sum()
        return [state["a"], state["b"], history, *torch.autograd.grad(loss, [a, b])]

    wanted = run(a.clone().requires_grad_(), b.clone().requires_grad_())
    found = run(*(distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (a, b)))
    assert isinstance(found[0], DTensor)
    assert found[0].placements == (Shard(0),)
    same(found, [t.detach() for t in wanted])


class Mlp(nn.Module):
    """Two layers, which are the subgraphs of one op."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, dtype=torch.float64), nn.Linear(8, 6, dtype=torch.float64)
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), values((8, 6), (8,), (6, 8), (6,)), strict=True):
                parameter.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(self.up, self.down, x)


@on_four
def a_tensor_parallel_mlp_trains_as_on_one_process(mesh: DeviceMesh) -> None:
    (x,) = values((5, 6))
    plain, spread = Mlp(), Mlp()
    # By columns, then by rows: the parameters are DTensors that the op's subgraphs close over.
    placements = {"up.weight": Shard(0), "up.bias": Shard(0), "down.weight": Shard(1), "down.bias": Replicate()}
    for name, placement in placements.items():
        module, _, leaf = name.partition(".")
        layer = spread.get_submodule(module)
        setattr(layer, leaf, nn.Parameter(distribute_tensor(layer.get_parameter(leaf).detach(), mesh, [placement])))
    inputs = distribute_tensor(x, mesh, [Replicate()])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (plain, spread)]
    for _ in range(3):
        for model, given, optimizer in zip((plain, spread), (x, inputs), optimizers, strict=True):
            optimizer.zero_grad()
            output = model(given)
            (output * output).mean().backward()
            optimizer.step()
    assert isinstance(output, DTensor)
    same([model.detach() for model in (spread(inputs), *spread.parameters())], [plain(x).detach(), *plain.parameters()])


@on_four
def the_styles_of_torch_work_on_the_modules_of_an_op(mesh: DeviceMesh) -> None:
    (x,) = values((5, 6))
    plain, spread = Mlp(), Mlp()
    parallelize_module(spread, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with CommDebugMode() as comm, torch.no_grad():
        spread(x)
    assert comm.get_total_counts() == 1  # the sum after the second layer
    output = spread(x)
    output.sum().backward()
    plain(x).sum().backward()
    same([output.detach()], [plain(x).detach()])
    gradients = [p.grad for p in spread.parameters() if p.grad is not None]
    same(gradients, [p.grad for p in plain.parameters() if p.grad is not None])
    assert len(gradients) == 4


@on_four
def a_compiled_op_is_as_on_one_process(mesh: DeviceMesh) -> None:
    x, up, down = values((5, 6), (8, 6), (6, 8))

    def run(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return mlp(lambda y: linear(y, up), lambda y: linear(y, down), x)

    plain = [t.clone().requires_grad_() for t in (x, up, down)]
    placements = [Replicate(), Shard(0), Shard(1)]
    spread = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip((x, up, down), placements, strict=True)]
    wanted, found = run(*plain), torch.compile(run, backend="aot_eager")(*spread)
    assert isinstance(found, DTensor)
    gradients = torch.autograd.grad(found.sum(), spread)
    same([found, *gradients], [wanted.detach(), *torch.autograd.grad(wanted.sum(), plain)])


@on_four
def a_sharded_constant_graph_is_as_on_one_process(mesh: DeviceMesh) -> None:
    graph, weights = lora()
    wanted = hopkit_constgraph.run_const_graph(graph, weights)
    for placement in (Replicate(), Shard(0), Shard(1)):
        spread = tuple(distribute_tensor(w, mesh, [placement if w.ndim > 1 else Replicate()]) for w in weights)
        found = hopkit_constgraph.run_const_graph(graph, spread)
        assert isinstance(wanted, tuple)
        assert isinstance(found, tuple)
        assert all(isinstance(f, DTensor) for f in found)
        same(found, wanted)


def lora() -> tuple[torch.fx.GraphModule, tuple[Tensor, ...]]:
    """What a LoRA merge computes from its weights: W + s B A."""

    def merged(w: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        weight = w + 0.5 * (up @ down)
        return weight, weight.square().sum(0)

    graph = torch.fx.symbolic_trace(merged)
    return graph, tuple(values((8, 8), (2, 8), (8, 2)))


@on_four
def gradients_reach_what_a_constant_graph_takes(mesh: DeviceMesh) -> None:
    graph, weights = lora()

    def run(*weights: Tensor) -> Tensor:
        weight, norms = cast("tuple[Tensor, Tensor]", hopkit_constgraph.run_const_graph_derive(graph, weights))
        return weight * norms

    plain = [t.clone().requires_grad_() for t in weights]
    spread = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in weights]
    wanted, found = (torch.autograd.grad(run(*inputs).sum(), inputs) for inputs in (plain, spread))
    same(found, wanted)


# With a rule: the op runs once, on what each process has


@on_four
def a_rule_redistributes_and_says_how_outputs_are_placed(mesh: DeviceMesh) -> None:
    (x,) = values((8, 4))
    seen: list[tuple[type, tuple[int, ...]]] = []

    def body(y: Tensor) -> Tensor:
        seen.append((type(y), tuple(y.shape)))
        return y.softmax(-1)

    result = rows(body, distribute_tensor(x, mesh, [Shard(1)]), scale=3.0)
    assert seen == [(Tensor, (2, 4))]
    assert isinstance(result, DTensor)
    assert result.placements == (Shard(0),)
    same([result], [3.0 * x.softmax(-1)])


@on_four
def derivatives_pass_through_a_rule_three_times(mesh: DeviceMesh) -> None:
    (x,) = values((8, 4))
    for placement in (Shard(0), Shard(1), Replicate()):
        agrees(lambda x: rows(lambda y: (y * y).softmax(-1), x), [x], mesh, [placement])


@on_four
def what_a_subgraph_closes_over_is_gathered_and_gets_its_gradient(mesh: DeviceMesh) -> None:
    tensors = values((8, 4), (4, 4))
    for placement in (Shard(0), Shard(1), Replicate()):
        result = agrees(lambda x, w: rows(lambda y: torch.tanh(y @ w) @ w, x), tensors, mesh, [Shard(0)], [placement])
        assert isinstance(result, DTensor)
        assert result.placements == (Shard(0),)


@on_four
def a_rule_can_split_a_layer_by_its_hidden_size(mesh: DeviceMesh) -> None:
    tensors = values((5, 6), (6, 8), (8, 3))
    result = agrees(lambda *a: gated(torch.tanh, *a), tensors, mesh, [Shard(1)], [Shard(1)], [Replicate()])
    assert isinstance(result, DTensor)
    assert result.placements == (Partial(),)
    spread = [distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, [Replicate(), Shard(1), Shard(0)], strict=True)]
    with CommDebugMode() as comm:
        gated(torch.tanh, *spread)
    assert comm.get_total_counts() == 0


@on_four
def a_rule_is_about_every_dimension_of_a_mesh(mesh: DeviceMesh) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    tensors, placements = (
        values((4, 6), (6, 8), (8, 3)),
        ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Shard(0)] * 2),
    )
    result = agrees(lambda *a: gated(torch.tanh, *a), tensors, grid, *placements)
    assert isinstance(result, DTensor)
    assert result.placements == (Shard(0), Partial())


@on_four
def shards_may_be_of_several_sizes(mesh: DeviceMesh) -> None:
    tensors = values((6, 4), (4, 4))  # 2, 2, 2 and none
    result = agrees(lambda x, w: rows(lambda y: torch.tanh(y @ w), x), tensors, mesh, [Shard(0)], [Shard(0)])
    assert result.shape == (6, 4)
    grid = init_device_mesh("cpu", (2, 2))
    split = [Shard(0), Shard(0)]
    assert agrees(lambda x, w: rows(lambda y: y @ w, x), values((5, 4), (4, 4)), grid, split, split).shape == (5, 4)


@on_four
def a_replicated_output_beside_a_split_one_counts_once(mesh: DeviceMesh) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        a, b = two(torch.tanh, x, w)
        return a * b

    agrees(run, values((8, 4), (4, 4)), mesh, [Shard(0)], [Shard(1)])
    (w,) = values((4, 4))
    spread = distribute_tensor(w, mesh, [Replicate()]).requires_grad_()
    _, b = two(torch.tanh, distribute_tensor(torch.ones(8, 4, dtype=torch.float64), mesh, [Shard(0)]), spread)
    same(torch.autograd.grad(b.sum(), spread), [2 * w])


@on_four
def a_sum_may_stay_open(mesh: DeviceMesh) -> None:
    (x,) = values((4, 4))

    @hopkit.define("dt_linear")
    def scaled(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x)

    hopkit_dtensor.sharding(scaled)(lambda x: ([x], [x]))

    def run(x: Tensor) -> Tensor:
        summed = x.sum(0)  # of rows that are spread
        return scaled(lambda y: 3.0 * y, summed)

    result = agrees(run, [x], mesh, [Shard(0)])
    assert isinstance(result, DTensor)
    assert result.placements == (Partial(),)


@on_four
def a_constant_graph_follows_a_rule(mesh: DeviceMesh) -> None:
    @hopkit.define("dt_const")
    def const(graph: torch.fx.GraphModule, args: tuple[Tensor, ...]) -> object:
        return graph(*args)

    @hopkit_dtensor.sharding(const)
    def columns(*args: Placements) -> tuple[list[Placements], list[Placements]]:
        return [(Shard(1),), (Shard(1),), (Replicate(),)], [(Shard(1),), (Shard(0),)]

    graph, weights = lora()
    found = const(graph, tuple(distribute_tensor(w, mesh, [Shard(0)]) for w in weights))
    assert isinstance(found, tuple)
    assert [f.placements for f in found] == [(Shard(1),), (Shard(0),)]
    same(found, graph(*weights))


@on_four
def without_its_rule_an_op_gives_the_same(mesh: DeviceMesh) -> None:
    tensors = values((5, 6), (6, 8), (8, 3))
    spread = [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors]
    with hopkit.decompose(gated):
        agrees(lambda *a: gated(torch.tanh, *a), tensors, mesh, [Shard(0)], [Shard(0)], [Shard(0)])
        same([gated(torch.tanh, *spread)], [whole(gated(torch.tanh, *tensors))])


@on_four
def shards_of_nothing_are_refused_by_all_processes(mesh: DeviceMesh) -> None:
    """They have 2, 2, 1 and no rows; with one more each it is not how DTensor shards nine."""
    (x,) = values((5, 4))
    with pytest.raises(RuleError, match=r"the sharding rule of op 'dt_rows' gives .*are no such shards"):
        rows(lambda y: torch.cat([y, torch.ones(1, 4, dtype=y.dtype)]), distribute_tensor(x, mesh, [Shard(0)]))


@on_four
def a_process_off_the_mesh_has_nothing_to_do(mesh: DeviceMesh) -> None:
    (x,) = values((4, 4))
    half = DeviceMesh("cpu", [0, 1])
    result = rows(torch.sin, distribute_tensor(x, half, [Shard(0)]))
    assert isinstance(result, DTensor)
    assert result.shape == (4, 4)
    assert result.to_local().numel() == (8 if dist.get_rank() < 2 else 0)
    if dist.get_rank() < 2:
        same([result], [x.sin()])


def _work(rank: int, directory: Path) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(directory / "store"), WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    problems: dict[str, str] = {}
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        warnings.simplefilter("error")
        for name, check in CHECKS.items():
            try:
                check(mesh)
                problems[name] = ""
            except (Exception, pytest.fail.Exception):  # what pytest.raises raises is no Exception
                problems[name] = traceback.format_exc()
    finally:
        (directory / f"{rank}.json").write_text(json.dumps(problems), encoding="utf-8")
        dist.destroy_process_group()


if __name__ == "__main__":
    _work(int(sys.argv[1]), Path(sys.argv[2]))
