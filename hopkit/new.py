"""``hopkit new``: a plugin package to begin with."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$name"
version = "0.0.1"
description = "An op for PyTorch, and a plugin for hopkit."
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["hopkit"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points.hopkit]
$package = "$package"

[tool.hatch.build.targets.wheel]
packages = ["src/$package"]

[tool.pytest.ini_options]
testpaths = ["tests"]
""",
    "README.md": """\
# $name

A plugin for hopkit. It brings one op, `$package.twice`, which torch knows as `${package}_twice`.

    pip install -e ".[test]"
    pytest                           # the op in every mode, against its body in plain PyTorch
    hopkit check ${package}_twice    # the same, as a table
    hopkit explain ${package}_twice  # which rule answers in which mode
""",
    "src/$package/__init__.py": '''\
"""A plugin for hopkit: one op, and no rule, since all of them follow from the op's body."""

from collections.abc import Iterable

import hopkit
import torch


def samples() -> Iterable[hopkit.Sample]:
    """Example calls, for the tests and for ``hopkit check``."""
    x = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
    yield hopkit.Sample((torch.sin, x), name="function")
    yield hopkit.Sample((lambda y: y * weight, x), {"scale": 2.0}, name="closure")


@hopkit.define("${package}_twice", samples=samples)
def twice(body: hopkit.Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Apply ``body`` twice, and scale the result."""
    return scale * body(body(x))


@hopkit.hookimpl
def hopkit_add_ops() -> Iterable[object]:
    """Tell hopkit what this plugin brings."""
    return [twice]
''',
    "src/$package/py.typed": "",
    "tests/test_twice.py": '''\
"""The op in every mode, against its body in plain PyTorch."""

from collections.abc import Callable

import hopkit
import pytest
from $package import twice


@pytest.mark.hopkit(op=twice)
def test_every_mode(hopkit_cell: Callable[[], None]) -> None:
    hopkit_cell()


def test_the_plugin_is_found() -> None:
    (info,) = [plugin for plugin in hopkit.plugins() if plugin.name == "$package"]
    assert not info.error
''',
}


def new(name: str, directory: Path) -> list[Path]:
    """Write a plugin package into ``directory / name``.

    Args:
        name: The name of the distribution; the package is called the same, with underscores.
        directory: Where to put it.

    Returns:
        The files, ``pyproject.toml`` first.

    Raises:
        ValueError: The name cannot be the name of a package, or is taken. Nothing is written then.
        FileExistsError: There is such a directory already. Nothing is written then.
    """
    package = re.sub(r"[-_.]+", "_", name).lower()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]", name) or keyword.iskeyword(package):
        raise ValueError(
            f"{name!r} cannot be the name of a package: use letters, digits and dashes, such as hopkit-mine"
        )
    if importlib.util.find_spec(package) is not None:
        raise ValueError(f"there is a package {package!r} already: Python could not import both, choose another name")
    root = directory / name
    if root.exists():
        raise FileExistsError(f"{root} is there already: choose another name or --directory")
    written = []
    for path, text in FILES.items():
        file = root / _filled(path, name, package)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_filled(text, name, package), encoding="utf-8")
        written.append(file)
    return written


def _filled(text: str, name: str, package: str) -> str:
    return Template(text).substitute(name=name, package=package)
