"""A short run of the fuzzer. A long one: ``python -m tests.fuzz --count 10000``."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hopkit
from tests.fuzz.judge import found, program
from tests.fuzz.program import Function, Held, Program, smaller, source
from tests.fuzz.stacks import LAYERS, Run


@pytest.mark.parametrize("seed", ["ci", "flow-ci"])
def test_a_hundred_programs(seed: str) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.fuzz", "--count", "100", "--seed", seed, "--seconds", "10"]
    env = {**os.environ, "PYTHONPATH": str(root), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "right" in run.stdout, run.stdout


def test_a_program_prints_and_is_read_again() -> None:
    for number in range(20):
        made = program(f"print:{number}")
        assert eval(repr(made), {"Program": Program, "Function": Function, "Held": Held}) == made
        compile(source(made), "program", "exec")


def test_every_smaller_program_is_one() -> None:
    made = program("smaller:0")
    for candidate in smaller(made):
        compile(source(candidate), "program", "exec")
        assert candidate != made


def test_an_op_that_is_not_its_body_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(run: Run, a: int, b: int) -> Run:
        return lambda *ts: run(*ts) + ("fuzz_op" in hopkit.ops())

    monkeypatch.setitem(LAYERS, "off_by_one", off_by_one)
    right = Program(functions=(Function(steps=(("sin", 0, 0),)),), stack=(("traced", 0, 0),))
    assert found(right).verdict == "right"
    assert found(dataclasses.replace(right, stack=(("off_by_one", 0, 0),))).verdict == "wrong"
