"""``hopkit constgraph``: programs in files."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hopkit.cli import main
from hopkit_constgraph import run_const_graph_once
from tests.constgraph.models import Merged, X
from tests.fresh import python
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
    python("-m", "hopkit_constgraph", "fold", program, "-o", folded)
    code = (
        "import sys, torch, hopkit, hopkit_constgraph\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "with torch.no_grad():\n"
        "    first, second = model(torch.ones(2, 8)), model(torch.ones(2, 8))\n"
        "assert torch.equal(first, second)\n"
        "print(hopkit_constgraph.stats(model).hits, hopkit_constgraph.stats(model).misses)"
    )
    done = python("-c", code, folded)
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


def _rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """The archive, with what ``change`` makes of its files."""
    result = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(result, "w") as new:
        for item in old.infolist():
            new.writestr(item, change(item.filename, old.read(item)))
    path.write_bytes(result.getvalue())


def _newer(name: str, content: bytes) -> bytes:
    if not name.endswith("models/model.json"):
        return content
    data = json.loads(content)
    data["schema_version"] = {"major": 1000, "minor": 0}
    return json.dumps(data).encode()


def _foreign(name: str, content: bytes) -> bytes:
    return b"{}" if name.endswith(".json") else content


def _cut(name: str, content: bytes) -> bytes:
    return content[: len(content) // 2] if "weights" in name or name.endswith(".json") else content


@pytest.mark.parametrize("change", [_newer, _foreign, _cut])
@pytest.mark.parametrize("there", [False, True])
def test_a_program_that_torch_cannot_read(
    program: Path, capsys: Capture, change: Callable[[str, bytes], bytes], there: bool
) -> None:
    folded = program.with_name("folded.pt2")
    if there:
        folded.write_text("what was there")
    _rewritten(program, change)
    assert main(["constgraph", "fold", str(program), "-o", str(folded)]) == 2
    assert "model.pt2 is no exported program that torch" in capsys.readouterr().err
    assert folded.exists() is there
    if there:
        assert folded.read_text() == "what was there"


def test_a_program_without_a_constant_part(program: Path, capsys: Capture) -> None:
    model = torch.nn.Linear(8, 8)
    torch.export.save(torch.export.export(model, (X,)), program)
    folded = program.with_name("folded.pt2")
    assert main(["constgraph", "fold", str(program), "-o", str(folded)]) == 0
    assert "nothing is computed from weights alone" in capsys.readouterr().out
    same(torch.export.load(folded).module()(X), model(X))


def test_a_folder_that_is_not_there(program: Path, capsys: Capture) -> None:
    folded = program.parent / "nowhere" / "folded.pt2"
    assert main(["constgraph", "fold", str(program), "-o", str(folded)]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_program_is_folded_in_its_own_place(program: Path) -> None:
    assert main(["constgraph", "fold", str(program), "-o", str(program)]) == 0
    assert nodes(torch.export.load(program).graph_module, run_const_graph_once) == 1
    assert [path.name for path in program.parent.iterdir()] == ["model.pt2"]


def test_weights_are_left_out_of_the_file(program: Path, capsys: Capture) -> None:
    want = torch.export.load(program).module()(X)
    assert main(["constgraph", "fold", str(program), "-o", str(program), "--release"]) == 0
    assert "; 3 weights released" in capsys.readouterr().out
    loaded = torch.export.load(program)
    assert sorted(loaded.state_dict) == ["_constant_add", "base.bias"]
    same(loaded.module()(X), want)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_progress_is_told_on_a_terminal(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["constgraph", "fold", str(program), "-o", str(program)]) == 0
    told = terminal.getvalue().split("\r\x1b[2K")
    assert told[1].startswith("reading ")
    assert told[2].startswith("folding 9 nodes")
    assert told[3].startswith("writing ")
    assert told[-1] == ""
