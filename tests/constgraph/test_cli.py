"""``hopkit constgraph``: programs in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hopkit.cli import main
from hopkit_constgraph import run_const_graph_once
from tests.constgraph.models import Merged, X
from tests.recording import nodes, same

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch 2.13, of its own pytrees

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    torch.export.save(torch.export.export(Merged(), (X,)), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_a_program_is_folded(program: Path, capsys: Capture) -> None:
    folded = program.with_name("folded.pt2")
    assert main(["constgraph", "fold", str(program), "-o", str(folded)]) == 0
    assert "2 nodes moved, which give 1 constants" in capsys.readouterr().out
    loaded = torch.export.load(folded)
    assert nodes(loaded.graph_module, run_const_graph_once) == 1
    same(loaded.module()(X), Merged()(X))
    assert sorted(path.name for path in program.parent.iterdir()) == ["folded.pt2", "model.pt2"]


def test_a_report_writes_nothing(program: Path, capsys: Capture) -> None:
    assert main(["constgraph", "report", str(program), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["moved"] == 2
    assert [path.name for path in program.parent.iterdir()] == ["model.pt2"]


def test_the_module_is_the_command_and_a_loaded_program_runs_its_graph_once(program: Path) -> None:
    folded = program.with_name("folded.pt2")
    command = [sys.executable, "-m", "hopkit_constgraph", "fold", str(program), "-o", str(folded)]
    subprocess.run(command, capture_output=True, check=True)
    code = (
        "import sys, torch, hopkit, hopkit_constgraph\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "with torch.no_grad():\n"
        "    first, second = model(torch.ones(2, 8)), model(torch.ones(2, 8))\n"
        "assert torch.equal(first, second)\n"
        "print(hopkit_constgraph.stats(model).hits, hopkit_constgraph.stats(model).misses)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folded)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_a_file_that_is_no_program(program: Path, capsys: Capture) -> None:
    folded = program.with_name("folded.pt2")
    program.write_bytes(b"nothing of the kind")
    assert main(["constgraph", "fold", str(program), "-o", str(folded)]) == 2
    assert "is no exported program" in capsys.readouterr().err
    assert not folded.exists()


def test_a_file_that_is_not_there(capsys: Capture) -> None:
    assert main(["constgraph", "report", "there_is_no.pt2"]) == 2
    assert "there is no file there_is_no.pt2" in capsys.readouterr().err


def test_what_was_there_stays_until_the_new_file_is_whole(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = program.with_name("folded.pt2")
    folded.write_text("what was there")

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(torch.export, "save", full)
    assert main(["constgraph", "fold", str(program), "-o", str(folded)]) == 2
    assert folded.read_text() == "what was there"
    assert len(list(program.parent.iterdir())) == 2
