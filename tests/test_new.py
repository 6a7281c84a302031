"""``hopkit new``: what it writes installs, is found, and passes its own tests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import hopkit
from hopkit.cli import main
from hopkit.new import new
from tests.fresh import python


def run(*command: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a module of Python's where ``path`` is installed."""
    roots = [str(path), str(Path(hopkit.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    return python("-m", *command, cwd=cwd, env=environment, check=False)


def test_a_new_plugin_installs_and_passes_its_tests(tmp_path: Path) -> None:
    new("hopkit-fancy", tmp_path)
    project, site = tmp_path / "hopkit-fancy", tmp_path / "site"

    install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), str(project)]
    installed = run(*install, path=site, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr

    tests = run("pytest", "-q", "-W", "error", "-k", "not inductor", path=site, cwd=project)
    assert tests.returncode == 0, tests.stdout
    assert " passed" in tests.stdout

    plugins = run("hopkit", "plugins", "--json", path=site, cwd=tmp_path)
    (info,) = [info for info in json.loads(plugins.stdout) if info["name"] == "hopkit_fancy"]
    assert (info["distribution"], info["error"]) == ("hopkit-fancy", "")


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "hopkit-fancy", "--directory", str(tmp_path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["directory"] == str(tmp_path / "hopkit-fancy")
    assert sorted(map(Path, written["files"])) == sorted(p for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "cannot be the name of a package"),
        ("3d", "cannot be the name of a package"),
        ("../up", "cannot be the name of a package"),
        ("with space", "cannot be the name of a package"),
        ("class", "cannot be the name of a package"),
        ("torch", "there is a package 'torch' already"),
        ("hopkit-constgraph", "there is a package 'hopkit_constgraph' already"),
    ],
)
def test_a_bad_name_writes_nothing(name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", name, "--directory", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "hopkit-fancy"
    mine.mkdir()
    assert main(["new", "hopkit-fancy", "--directory", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not list(mine.iterdir())
