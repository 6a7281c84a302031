"""A dispatch mode and a tensor class of the plugin's own. Each has one rule, and takes every op whole by it."""

from __future__ import annotations

from typing import Any

import torch

from hopkit.extend import Call
from hopkit.extend.mode import TorchDispatchMode, map_leaves


class LogOps(TorchDispatchMode):
    """Collects the ``names`` of operators. It knows nothing of hopkit; what becomes of an op, `log_whole` says."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def log_whole(active: LogOps, call: Call) -> object:
    """Note the op, and let the next mode answer. While the rule runs, the mode is off: the inside is not logged."""
    active.names.append(call.op.name)
    return call()


class Made(torch.Tensor):
    """Holds a tensor, and the name of the op or operator that made it: ``by``."""

    held: torch.Tensor
    by: str

    def __new__(cls, held: torch.Tensor, by: str = "") -> Made:
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), dtype=held.dtype, device=held.device)
        self.held, self.by = held, by
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:  # type: ignore[override] # torch's stub leaves out the operator
        return made(str(func), func(*held(args), **held(kwargs or {})))


def held(values: Any) -> Any:
    """The values, with what a `Made` tensor holds in its place."""
    return map_leaves(lambda value: value.held if isinstance(value, Made) else value, values)


def made(by: str, values: Any) -> Any:
    """The values, with a `Made` tensor in place of every plain one."""
    return map_leaves(lambda value: Made(value, by) if isinstance(value, torch.Tensor) else value, values)


def make_whole(_: type[Made], call: Call) -> object:
    """Let the next mode answer, on what the tensors hold."""
    return made(call.op.name, call.replace(inputs=held(call.inputs))())
