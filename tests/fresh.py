"""New processes that need not import torch: forks of one that has imported it, and nothing of hopkit."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def python(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """``python *arguments``, which begin with ``-c`` or ``-m``.

    Raises:
        CalledProcessError: It failed, and ``check`` is true.
    """
    command = [*map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        status = _server().ask(
            {
                "arguments": command,
                "env": dict(os.environ if env is None else env),
                "cwd": str(cwd or Path.cwd()),
                "streams": [os.devnull, str(out), str(error)],
            }
        )
        done = subprocess.CompletedProcess(command, status, out.read_text("utf-8"), error.read_text("utf-8"))
    if check and status:
        raise subprocess.CalledProcessError(status, command, done.stdout, done.stderr)
    return done


class _Server:
    """Isolated, so that what it forks finds modules where ``env`` says, and nowhere else."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self._process.communicate)  # it ends with what it reads

    def ask(self, job: Mapping[str, object]) -> int:
        told, heard = self._process.stdin, self._process.stdout
        assert told is not None
        assert heard is not None
        told.write(json.dumps(job) + "\n")
        told.flush()
        return int(heard.readline())


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers:
        _servers.append(_Server())
    return _servers[0]


def _serve() -> None:
    import torch  # noqa: F401 # for those who import it again

    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _become(job: dict[str, Any]) -> None:
    """What Python does from its command line to its end."""
    for number, (path, flags) in enumerate(
        zip(job["streams"], (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
    ):
        os.dup2(os.open(path, flags), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    kind, code, *rest = job["arguments"]
    sys.path[:0] = ["" if kind == "-c" else job["cwd"], *filter(None, job["env"].get("PYTHONPATH", "").split(":"))]
    sys.argv = [kind, *rest]
    status: object = 0
    try:
        if kind == "-m":
            runpy.run_module(code, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec", dont_inherit=True), vars(sys.modules["__main__"]))
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        sys.stderr.write(f"{status}\n")
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
