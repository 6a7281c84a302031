"""AOTInductor: an exported program with ops is compiled to a package of C++, and runs without their bodies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit import Op, Subgraph
from tests.recording import define_once, define_twice, nodes, same

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's, of its own code
]


class Model(torch.nn.Module):
    """Ops in a loop, one in another; their subgraphs close over modules, a buffer, and a literal.

    Two calls are outlined: as code without Python calls no region, their body is inlined.
    """

    shift: Tensor

    def __init__(self, once: Op[..., Tensor], twice: Op[..., Tensor], outlined: Op[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.once, self.twice, self.outlined = once, twice, outlined
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("shift", torch.linspace(0.0, 0.2, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.twice(lambda y, layer=layer: self.once(torch.tanh, layer(y)) + self.shift, x, scale=0.5)
            x = self.outlined(lambda y, layer=layer: torch.tanh(layer(y)) + y, x)
        return self.once(lambda y, z: y * z * torch.tensor([1.0, 2.0, 3.0, 4.0]), x, x.cos())


def test_a_package_gives_what_the_model_gives(tmp_path: Path) -> None:
    from torch._inductor import aoti_compile_and_package, aoti_load_package  # loads torch's compiler

    once, twice = define_once(), define_twice()

    @hopkit.define("t_outlined", outline=True)
    def outlined(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    model = Model(once, twice, outlined).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    x = torch.linspace(-1.0, 1.0, 20).reshape(5, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    assert [nodes(program.graph_module, op) for op in (once, twice, outlined)] == [3, 2, 2]
    path = aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    packaged = aoti_load_package(path)
    for inputs in (x, x[:2], torch.cat([x, -x])):
        same(packaged(inputs), model(inputs))


def test_an_op_that_decides_on_a_value_cannot_be_packaged(tmp_path: Path) -> None:
    from torch._inductor import aoti_compile_and_package  # loads torch's compiler

    @hopkit.define("t_pick", inputs=lambda yes, no, x: ((x,), (x,)), outputs=lambda yes, no, x: torch.empty_like(x))
    def pick(yes: Subgraph, no: Subgraph, x: Tensor) -> Tensor:
        return yes(x) if x.sum() > 0 else no(x)

    class Pick(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pick(torch.sin, torch.cos, x)

    program = torch.export.export(Pick(), (torch.ones(3),))
    with pytest.raises(Exception, match="op 't_pick' cannot be packaged by AOTInductor"):
        aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    same(torch.compile(Pick(), backend="eager", fullgraph=True)(torch.ones(3)), torch.ones(3).sin())
