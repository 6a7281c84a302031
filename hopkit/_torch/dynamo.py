"""Dynamo's table of operators (torch/_dynamo/variables/higher_order_ops.py), and the frames that it must not read.

The table goes by name alone: an op that takes the name of one of torch's own must not get the other's treatment. Dynamo
may be imported before the op is defined, or after; hopkit never imports it before torch does.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

if TYPE_CHECKING:
    from torch._guards import Source
    from torch._ops import HigherOrderOperator

_LOADED = "torch._dynamo"
_MODULE = f"{_LOADED}.variables.higher_order_ops"

_before: dict[str, object] = {}
"""The names of hopkit's ops, and the entries of torch's own that stood there; None: there was none, as far as seen."""


def skip(function: FunctionType) -> None:
    """Let Dynamo run a function, and what it calls, as it stands.

    After a graph break it would read hopkit's frames.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


class Out:
    """Keeps Dynamo out while a subgraph is rehearsed or traced: what compiles itself, as ``torch.cond``, runs as it is.

    Dynamo would read the frames of the modes around, and (2.13) never again compile a function that it met in one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._stance: contextlib.AbstractContextManager[None] | None = None
        self._loaded = False

    def enter(self) -> None:
        """Once more; all threads share torch's setting."""
        with self._lock:
            self._count += 1
            if self._count > 1:
                return
            self._loaded = _LOADED in sys.modules
            if self._loaded:
                with contextlib.suppress(RuntimeError):  # Dynamo is reading, and so lets nobody in
                    self._stance = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        """Once less."""
        with self._lock:
            self._count -= 1
            if self._count:
                return
            stance, self._stance = self._stance, None
            if stance is not None:
                stance.__exit__(None, None, None)
            elif not self._loaded and _LOADED in sys.modules:
                torch.compiler.reset()  # the subgraph was the first to load it: nothing is lost


out = Out()


def register(name: str) -> None:
    """The operator of this name is one of hopkit's."""
    _before.setdefault(name, None)
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE], name)
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def restore(name: str) -> None:
    """It is no longer; torch's own has its name back, if there was one."""
    if name not in _before:
        return
    entry = _before.pop(name)
    if _MODULE in sys.modules:
        table = sys.modules[_MODULE]._hop_name_to_variable_class
        table.pop(name, None)
        if entry is not None:
            table[name] = entry


def _register(module: ModuleType, name: str) -> None:
    entry = module._hop_name_to_variable_class.get(name)
    if entry is not _variable:
        _before[name] = entry
        module._hop_name_to_variable_class[name] = _variable


def _variable(operator: HigherOrderOperator, source: Source | None = None, **kwargs: object) -> object:
    """Where Dynamo expects the class of its variable for an operator."""
    from hopkit._torch import frame  # torch's compiler is loaded by now

    return frame.Operator(operator, source, **kwargs)


class _Finder:
    """Waits for Dynamo to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As Python asks every finder: the one module, with a last step after its own code."""
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for name in list(_before):
                    _register(module, name)

            vars(spec.loader)["exec_module"] = exec_module
        return spec


_finder = _Finder()
