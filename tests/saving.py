"""What the tests of saved programs share: a package with an op, as pip installs it, and ways to save and to load."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import fresh
from tests.contract.seam import ROOT

PACKAGE = """
import enum, torch, hopkit
from hopkit.extend import hookimpl

class Order(enum.Enum):
    UP = 1
    DOWN = 2

@hopkit.define("t_pkg_apply")
def apply(body: hopkit.Subgraph, x: torch.Tensor, *, times: int = 2, order: Order = Order.UP) -> torch.Tensor:
    for _ in range(times):
        x = body(x)
    return x

@hookimpl
def hopkit_add_ops():
    return [apply]
"""


class Package:
    """A distribution ``t-pkg`` 1.2, whose module ``t_pkg`` is a plugin that brings the op ``t_pkg_apply``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        info = folder / "t_pkg-1.2.dist-info"
        info.mkdir(parents=True)
        (folder / "t_pkg.py").write_text(PACKAGE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: t-pkg\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text("[hopkit]\npkg = t_pkg\n")
        (info / "RECORD").write_text("t_pkg.py,,\n")

    def imported(self) -> ModuleType:
        """The module, from now on installed in this process too."""
        self._monkeypatch.syspath_prepend(self.folder)
        self._monkeypatch.delitem(sys.modules, "t_pkg", raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("t_pkg")


def python(program: str, *arguments: object, path: str = "", interpreter: Path | None = None) -> str:
    """What a new process prints."""
    command = ["-c", program, *map(str, arguments)]
    environment = {"PYTHONPATH": f"{ROOT}:{path}", "PATH": "", "HOME": "/nonexistent"}
    if interpreter is None:
        done = fresh.python(*command, env=environment, check=False)
    else:
        command = [str(interpreter), *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def saved(program: torch.export.ExportedProgram) -> bytes:
    """The program as a file has it."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def loaded(text: bytes) -> torch.export.ExportedProgram:
    """The program of a file."""
    return torch.export.load(io.BytesIO(text))


def again(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program, saved and loaded."""
    return loaded(saved(program))


def edited(text: bytes, change: Callable[[str], str]) -> bytes:
    """The file with another ``hopkit=`` in every node."""

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("name") == "hopkit" and "as_string" in value.get("arg", {}):
                value["arg"]["as_string"] = change(value["arg"]["as_string"])
            for item in value.values():
                visit(item)
        elif isinstance(value, list):
            for item in value:
                visit(item)

    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(text)) as old, zipfile.ZipFile(result, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("models/model.json"):
                data = json.loads(content)
                visit(data)
                content = json.dumps(data).encode()
            new.writestr(item, content)
    return result.getvalue()
