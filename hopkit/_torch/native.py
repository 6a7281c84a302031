"""C++ of ours, for what takes too long one Python object at a time.

It is compiled once per torch and Python, beside what runs, and kept in the user's cache. Nobody waits for it: until it
is there, and where it cannot be (no compiler, no headers of Python's, no place to keep it), the Python that it stands
for answers. Of torch it takes the folders ``include`` and ``lib``, which torch/utils/cpp_extension.py names too, and
its C++ standard (2.13, 2.14). If these are others one day, compiling fails, and Python goes on: see there for new ones.
Inductor's builder is not asked: it takes a second to import, and compiles for the processor at hand, and many machines
may have one home.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

import torch

# Renamed when it is whole. The shell does both, so that a process that ends early leaves a module to the next one.
_BUILD = 'nice "$@" -o "$0.new" && mv -f "$0.new" "$0"'


class Native:
    """One source file beside this one, a Python module in C++.

    Args:
        name: Of the file, and of the module.
    """

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.Lock()
        self._asked = False
        self.module: ModuleType | None = None
        self.builder: threading.Thread | None = None

    def ask(self) -> None:
        """Load the module into `module`, now if it was built before, otherwise when it is."""
        with self._lock:
            if self._asked:
                return
            self._asked = True
            if os.environ.get("HOPKIT_NATIVE") == "0":
                return
            if not self._load():
                builder = threading.Thread(target=self._follow, name=f"hopkit builds {self._name}", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread starts at exit
                    builder.start()
                    self.builder = builder

    def build(self) -> None:
        """Compile the module here and now, unless another process does; then wait for that.

        Raises:
            OSError: There is no place for it, or no shell.
            RuntimeError: There is no home.
            ValueError: ``CXX`` is no command.
            subprocess.SubprocessError: The compiler fails.
        """
        import fcntl  # where there is none there is no shell either

        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the shell has it too, as long as it runs
            if not path.exists():
                quiet = subprocess.DEVNULL
                command = ["sh", "-c", _BUILD, str(path), *self._command()]
                subprocess.run(command, check=True, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[lock.fileno()])

    @property
    def _source(self) -> Path:
        return Path(__file__).with_name(f"{self._name}.cpp")

    def _command(self) -> list[str]:
        compiler = shlex.split(os.environ.get("CXX") or "g++")
        loose = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []  # Python's own symbols
        root = Path(torch.__file__).parent
        headers = f"-I{root / 'include'}", f"-I{sysconfig.get_path('include')}"
        libraries = f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10"
        return [*compiler, "-shared", "-fPIC", "-std=c++20", "-O2", *loose, *headers, str(self._source), *libraries]

    def _path(self) -> Path:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
        of = f"{torch.__version__} {torch.version.git_version} {torch.__file__} {platform.machine()} {suffix}"
        key = hashlib.sha256(of.encode() + self._source.read_bytes()).hexdigest()[:16]
        return Path(cache, "hopkit", key, self._name + suffix)

    def _follow(self) -> None:
        try:
            self.build()
        except (ImportError, OSError, RuntimeError, ValueError, subprocess.SubprocessError):
            return
        self._load()

    def _load(self) -> bool:
        """Whether the module is there now. What cannot be loaded is taken away, so that it is built again."""
        with contextlib.suppress(OSError, RuntimeError):
            path = self._path()
            if path.exists():
                try:
                    self.module = _loaded(self._name, path)
                except (ImportError, OSError):
                    path.unlink(missing_ok=True)
        return self.module is not None


def _loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
