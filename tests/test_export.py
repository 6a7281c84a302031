"""torch.export: strict and not, static and dynamic; saved and loaded, the node is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hopkit import Op
from hopkit.op import AnyOp
from tests.recording import define_once, define_twice, nodes, same
from tests.saving import Package, python

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
]

X = torch.linspace(-1.0, 1.0, 20).reshape(5, 4)


class Model(torch.nn.Module):
    """Two ops; their subgraphs close over a parameter, a buffer and a module."""

    shift: Tensor

    def __init__(self, once: Op[..., Tensor], twice: Op[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.once, self.twice = once, twice
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("shift", torch.linspace(0.0, 0.2, 4))

    def step(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.scale + self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(lambda y, z: y * z + self.scale, x, self.twice(self.step, x, scale=2.0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_program_goes_round(strict: bool, dynamic: bool, tmp_path: Path) -> None:
    once, twice = define_once(), define_twice()
    model = Model(once, twice)
    shapes: Any = {"x": {0: torch.export.Dim("n", min=2, max=64)}} if dynamic else None
    program = torch.export.export(model, (X,), strict=strict, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    ops: list[AnyOp] = [once, twice]
    for again in (program, program.run_decompositions(), torch.export.load(tmp_path / "model.pt2")):
        assert [nodes(again.graph_module, op) for op in ops] == [1, 1]
        assert set(again.state_dict) == set(model.state_dict())
        for x in [X, X[:3]] if dynamic else [X]:
            same(again.module()(x), model(x))
    same(torch.export.unflatten(program)(X), model(X))


def test_a_batch_inside_a_subgraph_is_not_the_batch_around_it(tmp_path: Path) -> None:
    """torch writes down the number of a level, which was 1 where the subgraph was traced alone."""
    once = define_once()

    class Batched(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def body(y: Tensor, z: Tensor) -> Tensor:
                products: Tensor = torch.vmap(lambda w: z * w)(torch.arange(4.0))
                return products + y

            result: Tensor = torch.vmap(lambda y: once(body, y, y.sum()))(x)
            return result

    inputs = X[:4]
    torch.export.save(torch.export.export(Batched(), (inputs,), strict=False), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert nodes(program.graph_module, once) == 1
    same(program.module()(inputs), inputs.sum(1)[:, None] * torch.arange(4.0) + inputs)


LOAD = """
import sys, torch, hopkit
assert not {"t_pkg", "hopkit_constgraph", "torch._dynamo"} & set(sys.modules)
program = torch.export.load(sys.argv[1])
x, want, names = torch.load(sys.argv[2])
nodes = program.graph.find_nodes(op="call_function", target=torch.ops.higher_order.t_pkg_apply)
assert len(nodes) == 1 and list(program.state_dict) == names
torch.testing.assert_close(program.module()(x), want)
assert sys.modules["t_pkg"].apply.operator is nodes[0].target
"""


@pytest.mark.parametrize("strict", [False, True])
def test_a_new_process_that_knows_hopkit_alone_finds_the_op(
    strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Package(tmp_path / "site", monkeypatch).imported().apply

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = apply(lambda y: torch.tanh(self.linear(y)), x, times=3)
            return result

    model = Layer()
    torch.export.save(torch.export.export(model, (X,), strict=strict), tmp_path / "model.pt2")
    torch.save((X, model(X).detach(), list(model.state_dict())), tmp_path / "want.pt")
    python(LOAD, tmp_path / "model.pt2", tmp_path / "want.pt", path=str(tmp_path / "site"))
