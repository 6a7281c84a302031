"""torch.export of models with ``run_const_graph``: the node and the values survive, saved and loaded."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hopkit import Op
from hopkit_constgraph import run_const_graph, run_const_graph_derive
from tests.recording import nodes, same
from tests.saving import again

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch 2.13, of its own pytrees

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)


class Fold(torch.nn.Module):
    """Folds a weight by a small network, and scales its input with that."""

    def __init__(self, op: Op[..., object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op = op
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.fold = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        return x * cast("Tensor", self.op(self.fold, (self.weight,)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("op", [run_const_graph, run_const_graph_derive], ids=lambda op: op.spec.name)
def test_a_model_goes_round(op: Op[..., object], strict: bool) -> None:
    model = Fold(op)
    program = torch.export.export(model, (X,), strict=strict)
    for found in (program, again(program)):
        assert nodes(found.graph_module, op) == 1
        assert set(found.state_dict) == set(model.state_dict())
        same(found.module()(X), X * model.fold(model.weight))


class _Sum(torch.nn.Module):
    def forward(self, pair: Any) -> Any:
        return pair[0] + pair[1]


class Nested(torch.nn.Module):
    """As many conversions write it: the arguments are a pytree with a number in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.sum = torch.fx.symbolic_trace(_Sum())

    def forward(self, x: Tensor) -> Tensor:
        return x * cast("Tensor", run_const_graph(self.sum, ((self.weight, 2.0),)))


@pytest.mark.parametrize("strict", [False, True])
def test_nested_arguments_go_round(strict: bool) -> None:
    model = Nested()
    program = torch.export.export(model, (X,), strict=strict)
    for found in (program, again(program)):
        assert nodes(found.graph_module, run_const_graph) == 1
        same(found.module()(X), X * (model.weight + 2.0))
