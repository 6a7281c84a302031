"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import hopkit
from hopkit import Sample, Subgraph
from hopkit.cli import main
from hopkit.extend import OpSpec, hookimpl
from hopkit.kit import Kit
from tests import fresh

Capture = pytest.CaptureFixture[str]

X = torch.linspace(-1.0, 1.0, 4)


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def host(hopkit_fresh: Kit) -> Kit:
    @hopkit.define("demo_once", samples=lambda: [Sample((torch.sin, X), name="sin")])
    def once(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)

    @hopkit.define("demo_wrong", samples=lambda: [Sample((torch.sin, X), name="sin")])
    def wrong(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)

    @wrong.rule("device")
    def kernel(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return x

    return hopkit_fresh


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "hopkit", "ops", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "constgraph_run" in [row["op"] for row in json.loads(done.stdout)]


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["check"], ["explain", "demo_once", "--mode", "fake"]])
def test_a_command_that_makes_no_sense_ends_with_2(argv: list[str], capsys: Capture) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("usage: hopkit")
    assert main([*argv, "--json"]) == 2
    assert "error" in json.loads(capsys.readouterr().out)


# Commands of plugins


def greet(argv: Sequence[str]) -> int:
    """Say hello."""
    if not argv:
        raise ValueError("nobody to greet")
    sys.stdout.write(f"hello {argv[0]}\n")
    return 0


def test_a_plugin_brings_a_command(host: Kit, capsys: Capture) -> None:
    class Greeting:
        @hookimpl
        def hopkit_add_commands(self) -> dict[str, Callable[[Sequence[str]], int]]:
            return {"greet": greet}

    host.register(Greeting(), "greeting")
    assert main(["greet", "--you"]) == 0
    assert capsys.readouterr().out == "hello --you\n"
    assert main(["greet"]) == 2
    assert capsys.readouterr().err == "hopkit: nobody to greet\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Say hello." in capsys.readouterr().out


def test_a_plugin_brings_what_is_no_command(host: Kit, capsys: Capture) -> None:
    class Wrong:
        @hookimpl
        def hopkit_add_commands(self) -> list[str]:
            return ["greet"]

    host.register(Wrong(), "wrong")
    assert main(["ops"]) == 2
    assert "plugin 'wrong', hook 'hopkit_add_commands' gave ['greet']" in capsys.readouterr().err


# plugins, ops, explain


def test_plugins_are_listed(capsys: Capture) -> None:
    assert main(["plugins"]) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["plugin", "distribution", "version", "state", "answers"]
    assert ["hopkit.rules.device", "hopkit", hopkit.__version__, "loaded", "hopkit_device_rule"] in rows


def install(folder: Path, name: str, code: str) -> None:
    """A distribution with one module, which is a plugin."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[hopkit]\n{name} = t_installed_{name}\n", encoding="utf-8")
    (folder / f"t_installed_{name}.py").write_text(code, encoding="utf-8")


def run(folder: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """One command, where what is in the folder is installed."""
    path = os.pathsep.join([str(folder), str(Path(hopkit.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return fresh.python("-m", "hopkit", *argv, env=environment, check=False)


RULE = """
from hopkit.extend import hookimpl

@hookimpl
def hopkit_device_rule(op):
    return {}
"""


@pytest.mark.parametrize(
    ("code", "state", "message"),
    [
        ("import there_is_no_such_module", "failed", "ModuleNotFoundError"),
        ("import sys; sys.exit()", "failed", "cannot be imported: t_installed_broken raised SystemExit"),
        (RULE.format("1 / 0"), "faulty", "op 'constgraph_run' raised ZeroDivisionError"),
        (RULE.format("7"), "faulty", "op 'constgraph_run' gave 7, a int"),
    ],
    ids=["import", "exit", "raising", "type"],
)
def test_a_plugin_that_is_broken_is_listed_and_the_status_says_so(
    code: str, state: str, message: str, tmp_path: Path
) -> None:
    install(tmp_path, "broken", code)
    done = run(tmp_path, "plugins", "--json", HOPKIT_PLUGINS="constgraph,broken")
    infos = {info["name"]: info for info in json.loads(done.stdout)}
    assert done.returncode == 1
    assert infos["broken"]["state"] == state
    assert message in infos["broken"]["error"]
    assert (infos["constgraph"]["state"], infos["constgraph"]["error"]) == ("loaded", "")
    assert done.stderr.count(message) == 1


@pytest.mark.parametrize("variable", ["HOPKIT_PLUGINS", "HOPKIT_BLOCK"])
def test_a_variable_that_names_what_is_not_installed_is_told_of(variable: str, tmp_path: Path) -> None:
    done = run(tmp_path, "plugins", **{variable: "nope"})
    assert done.returncode == 0
    assert done.stderr.startswith(f"hopkit: warning: {variable} names plugin 'nope', which is not installed")


def test_a_conflict_of_installed_plugins_is_told_by_every_command_that_meets_it(tmp_path: Path) -> None:
    for name in ("left", "right"):
        install(tmp_path, name, RULE.format("lambda graph, args: args"))
    chosen = "constgraph,left,right"
    listed = run(tmp_path, "plugins", HOPKIT_PLUGINS=chosen)
    explanation = run(tmp_path, "explain", "run_const_graph", HOPKIT_PLUGINS=chosen)
    checked = run(tmp_path, "check", "run_const_graph", "--mode", "fake", HOPKIT_PLUGINS=chosen)
    message = "op 'constgraph_run' in mode 'device' is claimed by plugins 'left' and 'right'"
    assert [line.split()[3] for line in listed.stdout.splitlines() if message in line] == ["faulty", "faulty"]
    assert [line.split()[:2] for line in explanation.stdout.splitlines() if message in line] == [["device", "conflict"]]
    assert checked.stdout.splitlines()[1].split()[:3] == ["device", "any", "error"]
    assert message in checked.stdout.splitlines()[1]
    assert [done.returncode for done in (listed, explanation, checked)] == [1, 1, 1]


def test_ops_are_listed(capsys: Capture) -> None:
    assert main(["ops", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {
        "op": "demo_once",
        "function": "tests.test_cli.host.<locals>.once",
        "plugin": "",
        "signature": "(body: Subgraph, x: Tensor)",
    }


def test_an_op_is_explained(capsys: Capture) -> None:
    assert main(["explain", "wrong"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("demo_wrong(body: Subgraph, x: Tensor)\n")
    assert "hand-written  author" in out


def test_an_explanation_as_json(capsys: Capture) -> None:
    assert main(["explain", "demo_wrong", "--json"]) == 0
    rows = {row["mode"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["device"]["kind"], rows["device"]["plugin"]) == ("hand-written", "author")


@pytest.mark.parametrize("command", ["explain", "check"])
def test_an_unknown_op_ends_with_2_and_a_suggestion(command: str, capsys: Capture) -> None:
    assert main([command, "demo_onec"]) == 2
    assert "Did you mean 'demo_once'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain", "check"])
def test_an_error_as_json(command: str, capsys: Capture) -> None:
    assert main([command, "demo_onec", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith("op 'demo_onec' is not defined")


# check


def test_a_right_op_ends_with_0(capsys: Capture) -> None:
    assert main(["check", "demo_once", "--mode", "eager", "--mode", "fake"]) == 0
    header, eager, fake, _, summary = capsys.readouterr().out.splitlines()
    assert header.split() == ["mode", "sample", "verdict", "error", "time", "note"]
    assert eager.split()[:3] == ["eager", "sin", "right"]
    assert fake.split()[:3] == ["fake", "sin", "right"]
    assert summary == "2 right"


def test_a_wrong_op_ends_with_1(capsys: Capture) -> None:
    assert main(["check", "demo_wrong", "--mode", "eager", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert report["cells"][0]["verdict"] == "wrong"


def test_an_unknown_mode_ends_with_2(capsys: Capture) -> None:
    assert main(["check", "demo_once", "--mode", "fakes"]) == 2
    assert "there is no mode 'fakes', did you mean 'fake'?" in capsys.readouterr().err


def test_progress_goes_to_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    told = Terminal()
    monkeypatch.setattr(sys, "stderr", told)
    main(["check", "demo_once", "--mode", "eager", "--json"])
    assert "[0/1] eager-sin" in told.getvalue()
    assert json.loads(capsys.readouterr().out)["ok"]


def test_no_progress_elsewhere(capsys: Capture) -> None:
    main(["check", "demo_once", "--mode", "eager"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_terminals(no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("NO_COLOR", no_color)
    main(["check", "demo_once", "--mode", "eager"])
    assert ("\x1b[32mright" in shown.getvalue()) is coloured


def test_no_colour_elsewhere(capsys: Capture) -> None:
    main(["check", "demo_wrong", "--mode", "eager"])
    assert "\x1b" not in capsys.readouterr().out


# check --program


class FromProgram:
    """A plugin that makes a sample from the first weight of a program."""

    @hookimpl(op="demo_once")
    def hopkit_samples_from_program(self, op: OpSpec, program: torch.export.ExportedProgram) -> list[Sample]:
        return [Sample((torch.sin, next(iter(program.state_dict.values())).detach()), name="from the file")]


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = str(tmp_path / "linear.pt2")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 3), (torch.ones(2),)), path)
    return path


def test_samples_come_from_a_program(program: str, capsys: Capture) -> None:
    hopkit.register(FromProgram(), "from_program")
    assert main(["check", "demo_once", "--mode", "eager", "--program", program]) == 0
    assert "from the file" in capsys.readouterr().out


def test_a_program_that_no_plugin_reads_ends_with_2(program: str, capsys: Capture) -> None:
    hopkit.register(FromProgram(), "from_program")
    assert main(["check", "demo_wrong", "--program", program]) == 2
    assert "no plugin makes samples of op 'demo_wrong'" in capsys.readouterr().err


def test_samples_that_are_none_end_with_2(program: str, capsys: Capture) -> None:
    class Wrong:
        @hookimpl
        def hopkit_samples_from_program(self, op: OpSpec, program: torch.export.ExportedProgram) -> list[int]:
            return [7]

    hopkit.register(Wrong(), "wrong")
    assert main(["check", "demo_once", "--program", program]) == 2
    assert "plugin 'wrong', hook 'hopkit_samples_from_program', op 'demo_once' gave [7]" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "told"), [(None, "there is no file"), ("no program", "is no exported program")])
def test_a_file_that_is_no_program_ends_with_2(text: str | None, told: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "model.pt2"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert main(["check", "demo_once", "--program", str(path)]) == 2
    assert told in capsys.readouterr().err
