"""Dynamo's table of operators (torch/_dynamo/variables/higher_order_ops.py), and the frames that it must not read.

The table goes by name alone: an op that takes the name of one of torch's own must not get the other's treatment. Dynamo
may be imported before the op is defined, or after; hopkit never imports it before torch does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

from hopkit._torch.later import after_import

if TYPE_CHECKING:
    from torch._guards import Source
    from torch._ops import HigherOrderOperator

_MODULE = "torch._dynamo.variables.higher_order_ops"

_before: dict[str, object] = {}
"""The names of hopkit's ops, and the entries of torch's own that stood there; None: there was none, as far as seen."""


def skip(function: FunctionType) -> None:
    """Let Dynamo run a function, and what it calls, as it stands.

    After a graph break it would read hopkit's frames.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def leave(reason: str) -> None:
    """Break the graph here, where Dynamo reads this: with ``fullgraph=True`` an error that gives the reason."""
    torch._dynamo.graph_break(msg=reason)


def undecorated(function: Callable[..., object]) -> Callable[..., object]:
    """What ``dont_skip_tracing`` made this of, which sets and resets options of Dynamo's at every call; or itself.

    That keeps what it wraps in a closure and does not tell (torch/_dynamo/external_utils.py; 2.13, 2.14). If it is done
    in another way, the options are set.
    """
    within = inspect.getclosurevars(function).nonlocals.get("func")
    return within if callable(within) else function


def register(name: str) -> None:
    """The operator of this name is one of hopkit's."""
    _before.setdefault(name, None)
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE], name)


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


def _register_all(module: ModuleType) -> None:
    for name in list(_before):
        _register(module, name)


after_import(_MODULE, _register_all)
