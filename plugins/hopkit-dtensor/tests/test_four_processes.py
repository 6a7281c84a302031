"""On four processes over gloo, on the loopback device. They are started once, for all that on_four.py checks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORLD = 4
TIME_LIMIT = 240  # seconds, for all of them together; on two idle cores they take about 25
PROGRAM = Path(__file__).with_name("on_four.py")
CHECKS = re.findall(r"@on_four\ndef (\w+)", PROGRAM.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Per process, what failed in each check."""
    directory = tmp_path_factory.mktemp("four")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with contextlib.ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = []
        for rank in range(WORLD):
            log = stack.enter_context((directory / f"{rank}.log").open("w"))
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(rank), str(directory)], env=env, stdout=log, stderr=log, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        end = time.monotonic() + TIME_LIMIT
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))
    return [_told(directory, rank) for rank in range(WORLD)]


def _told(directory: Path, rank: int) -> dict[str, str]:
    """What a process wrote down; one that did not end well has failed in every check that it did not come to."""
    log = f"process {rank} did not come to this check\n{(directory / f'{rank}.log').read_text()}"
    file = directory / f"{rank}.json"
    return {**dict.fromkeys(CHECKS, log), **(json.loads(file.read_text()) if file.exists() else {})}


@pytest.mark.parametrize("name", CHECKS)
def test_on_four_processes(name: str, problems: list[dict[str, str]]) -> None:
    failed = {rank: found[name] for rank, found in enumerate(problems) if found[name]}
    assert not failed, "\n".join(failed.values())
