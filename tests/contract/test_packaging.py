"""The distribution is what its metadata, its README and its CI say it is."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import hopkit
import hopkit_constgraph
from tests.docs.snippets import named

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where the standard library has none

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
COMPAT = (ROOT / ".ci" / "compat").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


# Metadata


def test_the_version_is_written_once(project: dict[str, Any]) -> None:
    assert hopkit.__version__ == project["version"] == metadata.version("hopkit")
    literal = re.compile(rf"""["']{re.escape(project["version"])}["']""")
    sources = [*ROOT.glob("hopkit/**/*.py"), *ROOT.glob("hopkit_constgraph/**/*.py")]
    again = [str(path.relative_to(ROOT)) for path in sources if literal.search(path.read_text(encoding="utf-8"))]
    assert not again


def test_the_changelog_has_the_version(project: dict[str, Any]) -> None:
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", [hopkit, hopkit_constgraph])
def test_both_packages_are_typed(package: Any) -> None:
    assert Path(package.__file__).with_name("py.typed").is_file()


def test_the_licence_is_named_and_there(project: dict[str, Any]) -> None:
    assert project["license"] == "BSD-3-Clause"
    assert project["license-files"] == ["LICENSE"]
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("BSD 3-Clause License")


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("hopkit", "constgraph", "hopkit_constgraph"),
        ("pytest11", "hopkit", "pytest_hopkit"),
        ("console_scripts", "hopkit", "hopkit.cli:main"),
    ],
)
def test_entry_points_are_installed_and_load(group: str, name: str, value: str) -> None:
    found = [point for point in metadata.entry_points(group=group, name=name) if point.value == value]
    # An editable install may be seen twice, through the environment and through the working directory.
    assert found, "install the package, as the README does"
    found[0].load()


# The README's commands, and CI


@pytest.mark.parametrize("name", ["main", "tests"])
def test_a_readme_command_makes_its_environment_and_pins_torch(name: str) -> None:
    command = named(README, name)
    assert command.startswith("python3 -m venv .venv && ")
    (install,) = (part for part in command.split(" && ") if "pip install" in part)
    # Without the pin in the same call, pip would fetch the newest torch, and with it gigabytes of CUDA.
    assert re.search(r" torch==\d+\.\d+\.\d+ ", install)


def test_the_readme_commands_do_what_they_are_named_for() -> None:
    assert named(README, "main").endswith(".venv/bin/hopkit check run_const_graph")
    assert named(README, "tests").endswith(".venv/bin/python -m pytest")


@pytest.mark.parametrize("name", ["main", "tests"])
def test_ci_runs_the_readme_command_and_has_no_copy_of_it(name: str) -> None:
    assert re.search(rf"^ *from_readme {name}$", CI, flags=re.MULTILINE)
    assert '"$(python3' not in CI  # read into a variable first: a failure inside "$(...)" would not stop the script
    assert not re.search(r"-m (pytest|venv)|torch==", CI)


def test_ci_runs_the_suite_on_the_releases_that_the_readme_names() -> None:
    assert "README.md tests" in COMPAT
    (compat,) = re.findall(r"^ *\.ci/compat (\S+)$", CI, flags=re.MULTILINE)
    (pin,) = set(re.findall(r"torch==([\d.]+)", README))
    assert f".ci/compat {compat}" in README
    assert re.search(rf"tested,\s+{re.escape(pin)}\s+and\s+{re.escape(compat)}\b", README)
