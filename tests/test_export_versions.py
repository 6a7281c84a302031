"""A program that one torch saved, loaded by the other, where an environment with the other is beside the sources."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.seam import ROOT
from tests.saving import Package, python

pytestmark = [
    pytest.mark.usefixtures("hopkit_fresh"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
]

ENVIRONMENTS = [ROOT / name / "bin" / "python" for name in (".venv", ".venv-torch-2.14.1")]
OTHERS = [path for path in ENVIRONMENTS if path.exists() and not path.parent.samefile(Path(sys.executable).parent)]

MODEL = """
import torch, t_pkg

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        x = t_pkg.apply(lambda y: torch.tanh(self.linear(y)) * torch.tensor([1.0, 2.0, 3.0, 4.0]), x, times=3)
        return t_pkg.apply(lambda y: t_pkg.apply(torch.sin, y) * x, x)

def save(folder):
    for strict in (False, True):
        shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
        program = torch.export.export(Model(), (torch.ones(3, 4),), dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, f"{folder}/{strict}.pt2")

def load(folder):
    for strict in (False, True):
        program = torch.export.load(f"{folder}/{strict}.pt2")
        assert len(program.graph.find_nodes(op="call_function", target=t_pkg.apply.operator)) == 2
        for x in (torch.linspace(-1, 1, 20).reshape(5, 4), torch.ones(2, 4)):
            torch.testing.assert_close(program.module()(x), Model()(x))
"""

THERE = """
import sys, t_model, torch
t_model.load(sys.argv[1])
t_model.save(sys.argv[2])
print(torch.__version__)
"""


@pytest.mark.skipif(not OTHERS, reason="there is no other environment beside the sources")
@pytest.mark.parametrize("other", OTHERS, ids=lambda path: path.parents[1].name)
def test_a_program_goes_to_the_other_torch_and_back(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package(tmp_path / "site", monkeypatch)
    (package.folder / "t_model.py").write_text(MODEL)
    package.imported()
    monkeypatch.delitem(sys.modules, "t_model", raising=False)
    model = importlib.import_module("t_model")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    model.save(here)
    told = python(THERE, here, there, path=str(package.folder), interpreter=other)
    assert told.strip() != torch.__version__
    model.load(there)
