"""The plugin as it is installed, and what a sharding rule may say; on one process, which is a mesh too."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

import hopkit_dtensor
import pytest
import torch
import torch.distributed as dist
from hopkit_dtensor import Placements
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit.extend import CaptureError, RuleError
from hopkit.testing import fresh


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    with fresh():
        hopkit.register(hopkit_dtensor, "dtensor")
        yield


Rows = hopkit.Op[[hopkit.Subgraph, Tensor, Tensor], Tensor]


def define() -> Rows:
    @hopkit.define("t_rows")
    def rows(body: hopkit.Subgraph, x: Tensor, w: Tensor) -> Tensor:
        return body(x) @ w

    return rows


def sharded(given: object) -> Rows:
    """An op whose sharding rule gives ``given``, whatever the operands are."""
    op = define()
    hopkit_dtensor.sharding(op)(lambda x, w: given)  # type: ignore[type-var] # some are wrong
    return op


RIGHT = ([(Shard(0),), (Replicate(),)], [(Shard(0),)])


def spread(mesh: DeviceMesh) -> tuple[DTensor, DTensor]:
    x = distribute_tensor(torch.arange(6.0).reshape(2, 3), mesh, [Shard(1)])
    return x, distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)])


# In hopkit


def test_it_is_installed() -> None:
    (entry,) = [entry for entry in entry_points(group="hopkit") if entry.name == "dtensor"]
    assert entry.load() is hopkit_dtensor
    assert entry.dist is not None
    assert entry.dist.name == "hopkit-dtensor"


def test_the_mode_is_listed() -> None:
    (info,) = [info for info in hopkit.plugins() if info.name == "dtensor"]
    assert (info.modes, info.hooks, info.state) == (("dtensor",), ("hopkit_add_modes",), "loaded")


def test_explain_says_whether_there_is_a_rule() -> None:
    op = define()
    kinds = [{row.mode: row.kind for row in hopkit.explain(op).rows}["dtensor"]]
    hopkit_dtensor.sharding(op)(lambda x, w: RIGHT)
    kinds += [{row.mode: row.kind for row in hopkit.explain(op).rows}["dtensor"]]
    assert kinds == ["decomposing", "hand-written"]


def test_a_rule_needs_the_plugin() -> None:
    op = define()
    hopkit.unregister("dtensor")
    with pytest.raises(hopkit.PluginError, match="op 't_rows' cannot have a rule in mode 'dtensor'"):
        hopkit_dtensor.sharding(op)(lambda x, w: RIGHT)


# Whom a rule is asked for


def test_a_rule_is_asked_for_dtensors_alone(mesh: DeviceMesh) -> None:
    op, seen = sharded(RIGHT), list[type]()

    def body(y: Tensor) -> Tensor:
        seen.append(type(y))
        return y.sin()

    x, w = spread(mesh)
    result = op(body, x, w)
    assert isinstance(result, DTensor)
    assert result.placements == (Shard(0),)
    torch.testing.assert_close(result.full_tensor(), op(body, x.full_tensor(), w.full_tensor()))
    with hopkit.decompose(op):
        op(body, x, w)
    assert seen == [Tensor, Tensor, DTensor]


def test_a_rule_takes_the_options_that_it_names(mesh: DeviceMesh) -> None:
    @hopkit.define("t_dim")
    def total(body: hopkit.Subgraph, x: Tensor, *, dim: int, scale: float = 1.0) -> Tensor:
        return body(x).sum(dim) * scale

    @hopkit_dtensor.sharding(total)
    def along(x: Placements, *, dim: int) -> tuple[list[Placements], list[Placements]]:
        return [(Shard(1 - dim),)], [(Shard(0),)]

    x, _ = spread(mesh)
    for dim in (0, 1):
        result = total(torch.cos, x, dim=dim)
        assert isinstance(result, DTensor)
        torch.testing.assert_close(result.full_tensor(), x.full_tensor().cos().sum(dim))


def test_a_number_is_all_there_is_of_it_on_every_process(mesh: DeviceMesh) -> None:
    @hopkit.define("t_scaled")
    def scaled(body: hopkit.Subgraph, x: Tensor, by: Tensor) -> Tensor:
        return body(x) * by

    hopkit_dtensor.sharding(scaled)(lambda x, by: ([(Shard(0),), by], [(Shard(0),)]))
    (x, _), by = spread(mesh), torch.tensor(3.0, requires_grad=True)
    result = scaled(torch.cos, x, by)
    (gradient,) = torch.autograd.grad(result.sum(), by)
    torch.testing.assert_close(gradient, x.full_tensor().cos().sum())


def test_what_is_recorded_on_dtensors_is_the_body(mesh: DeviceMesh) -> None:
    op, (x, w) = sharded(RIGHT), spread(mesh)
    graph = make_fx(lambda x, w: op(torch.sin, x, w))(x.full_tensor(), w.full_tensor())
    assert graph.graph.find_nodes(op="call_function", target=op.operator)
    found, compiled = graph(x, w), torch.compile(lambda x, w: op(torch.sin, x, w), backend="aot_eager")(x, w)
    for result in (found, compiled):
        assert isinstance(result, DTensor)
        torch.testing.assert_close(result.full_tensor(), x.full_tensor().sin() @ w.full_tensor())


# What a rule may not say


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, "gives None, which is no pair"),
        ([RIGHT[0]], "which is no pair"),
        ((RIGHT[0][:1], RIGHT[1]), "gives placements for 1 operand tensors, and there are 2"),
        ((RIGHT[0], RIGHT[1] * 2), "gives placements for 2 outputs, and the op gives 1 tensors"),
        (([(Shard(0), Replicate()), (Replicate(),)], RIGHT[1]), "2 placements for operand tensor 0, .* 1 dimension"),
        ((RIGHT[0], [()]), "gives 0 placements for output 0, and the mesh has 1 dimension"),
        ((RIGHT[0], [Shard(0)]), r"gives Shard\(dim=0\) for output 0, and the mesh has 1 dimension"),
        (([("rows",), (Replicate(),)], RIGHT[1]), "gives 'rows' for operand tensor 0"),
        (([(Shard(2),), (Replicate(),)], RIGHT[1]), r"gives Shard\(dim=2\) for operand tensor 0, which has 2 dim"),
        ((RIGHT[0], [(Shard(-3),)]), r"gives Shard\(dim=-3\) for output 0, which has 2 dimensions"),
        (([(Partial(),), (Replicate(),)], [(Partial(),)]), r"asks for \(Partial\(sum\),\) of operand tensor 0"),
        ((RIGHT[0], [(Partial("max"),)]), r"gives Partial\(max\) for output 0"),
        ((RIGHT[0], [(Replicate(),)]), "splits an operand along mesh dimension 0, where all outputs"),
        (([(Replicate(),)] * 2, [(Shard(0),)]), "splits an output along mesh dimension 0, where all operands"),
    ],
)
def test_a_rule_that_is_wrong_is_refused(given: object, found: str, mesh: DeviceMesh) -> None:
    op = sharded(given)
    with pytest.raises(RuleError, match=f"the sharding rule of op 't_rows' .*{found}.* cannot be run on shards"):
        op(torch.sin, *spread(mesh))


def test_a_rule_that_takes_something_else_is_refused(mesh: DeviceMesh) -> None:
    op = define()
    hopkit_dtensor.sharding(op)(lambda x: RIGHT)
    with pytest.raises(RuleError, match=r"takes \(x\), and the op is called with 2 operand tensors"):
        op(torch.sin, *spread(mesh))


def test_a_plain_tensor_among_dtensors_is_refused(mesh: DeviceMesh) -> None:
    op, (x, w) = sharded(RIGHT), spread(mesh)
    with pytest.raises(hopkit.CallError, match=r"operand tensor 1 is a plain tensor of shape \(3, 2\)"):
        op(torch.sin, x, w.full_tensor())


def test_two_meshes_are_refused(mesh: DeviceMesh) -> None:
    op, (x, w) = sharded(RIGHT), spread(mesh)
    named = init_device_mesh("cpu", (1,), mesh_dim_names=("other",))
    other = distribute_tensor(torch.ones(3), named, [Replicate()])
    with pytest.raises(hopkit.CallError, match="is called with DTensors on 2 meshes"):
        op(torch.sin, x, distribute_tensor(w.full_tensor(), named, [Replicate()]))
    with pytest.raises(CaptureError, match=r"has a subgraph that closes over a DTensor on .*other=1"):
        op(lambda y: y * other, x, w)


def test_writing_is_refused(mesh: DeviceMesh) -> None:
    op, (x, w) = sharded(RIGHT), spread(mesh)
    with pytest.raises(RuleError, match="op 't_rows' writes to an operand or a capture under its sharding rule"):
        op(lambda y: y.mul_(2), x, w)
    held = distribute_tensor(torch.ones(3), mesh, [Shard(0)])
    with pytest.raises(RuleError, match="writes to an operand or a capture"):
        op(lambda y: y + held.add_(1), x, w)
