"""C++ is built once, beside what runs, and nobody needs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hopkit._torch import seen as looks
from hopkit._torch.native import Native
from hopkit.extend.device import Seen

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HOPKIT_NATIVE", raising=False)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Native:
    native = Native("seen")
    monkeypatch.setattr(looks, "NATIVE", native)
    return native


def _many() -> tuple[torch.Tensor, ...]:
    return tuple(torch.rand(3) for _ in range(looks.MANY))


def _settle(native: Native) -> None:
    assert native.builder is not None
    native.builder.join()


@compiled
def test_many_tensors_are_looked_at_in_cpp_when_it_is_there(native: Native) -> None:
    tensors = _many()
    Seen(tensors[1:])
    assert native.builder is None
    seen = Seen(tensors)
    assert seen.holds(tensors)
    _settle(native)
    assert seen.holds(tensors)
    assert not isinstance(seen._look, looks._InPython)
    tensors[5].zero_()
    assert not seen.holds(tensors)

    again = Native("seen")
    again.ask()
    assert again.module is not None
    assert again.builder is None


@compiled
def test_a_damaged_file_is_built_again(native: Native) -> None:
    native._path().parent.mkdir(parents=True)
    native._path().write_bytes(b"damaged")
    native.ask()
    _settle(native)
    assert native.module is not None


def test_it_may_be_forbidden(native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPKIT_NATIVE", "0")
    tensors = _many()
    assert Seen(tensors).holds(tensors)
    assert native.module is None
    assert native.builder is None
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "'", "true"])
def test_without_a_compiler_python_goes_on(
    compiler: str, native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    tensors = _many()
    seen = Seen(tensors)
    _settle(native)
    assert native.module is None
    assert seen.holds(tensors)
    assert seen.at_rest(tensors)
    tensors[0].zero_()
    assert not seen.holds(tensors)
    assert not [*tmp_path.rglob("*.so")]


def test_without_a_place_python_goes_on(native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tensors = _many()
    seen = Seen(tensors)
    _settle(native)
    assert native.module is None
    assert seen.holds(tensors)


@compiled
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho built >> {log}; exec g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    several = [Native("seen") for _ in range(3)]
    for native in several:
        native.ask()
    for native in several:
        _settle(native)
    assert all(native.module is not None for native in several)
    assert log.read_text() == "built\n"


@compiled
def test_a_process_that_ends_meanwhile_ends_without_a_word(native: Native) -> None:
    program = "from hopkit._torch.native import Native; Native('seen').ask()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, check=True)
    assert not done.stderr
    native.build()  # waits for what it started
    native.ask()
    assert native.module is not None
