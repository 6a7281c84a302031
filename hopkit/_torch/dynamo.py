"""Dynamo's table of operators (torch/_dynamo/variables/higher_order_ops.py), and the frames that it must not read.

The table goes by name alone: an op that takes the name of one of torch's own must not get the other's treatment. Dynamo
may be imported before the op is defined, or after; hopkit never imports it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

_MODULE = "torch._dynamo.variables.higher_order_ops"

_hidden: dict[str, object] = {}
"""The names that ops of hopkit have taken from torch's own, and the entries that stood there; None: not seen yet."""


def skip(function: FunctionType) -> None:
    """Let Dynamo run a function, and what it calls, as it stands.

    Dynamo knows no operator of hopkit in a graph, so it breaks there and calls it; then it would read hopkit's frames.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def hide(name: str) -> None:
    """An op has taken this name from one of torch's own: Dynamo knows no operator of the name."""
    _hidden.setdefault(name, None)
    if _MODULE in sys.modules:
        _hide_all(sys.modules[_MODULE])
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def restore(name: str) -> None:
    """torch's own operator has its name back."""
    entry = _hidden.pop(name, None)
    if entry is not None:
        sys.modules[_MODULE]._hop_name_to_variable_class[name] = entry


def _hide_all(module: ModuleType) -> None:
    for name in _hidden:
        _hidden[name] = module._hop_name_to_variable_class.pop(name, _hidden[name])


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
                _hide_all(module)

            vars(spec.loader)["exec_module"] = exec_module
        return spec


_finder = _Finder()
