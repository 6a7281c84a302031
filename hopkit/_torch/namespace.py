"""``torch.ops.higher_order``, where a saved program looks for its operators by name (torch/_ops.py, 2.13 and 2.14).

If that class is gone, a plugin's ops must be imported before a program that has them is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn, cast

import torch
from torch._ops import HigherOrderOperator, _higher_order_ops, _HigherOrderNamespace

_LOADER = "torch._export.serde.serialize"

Lookup = Callable[[], None]
Refuse = Callable[[str, dict[str, object]], NoReturn]


def open_namespace(look_further: Lookup, refuse: Refuse) -> None:
    """Have names looked for among what is installed, too.

    Args:
        look_further: Called once torch knows no operator of a name; it may define it.
        refuse: Called with the name and the keywords of a node, if it is still unknown when a loaded program runs.
    """
    _Namespace.look_further, _Namespace.refuse = staticmethod(look_further), staticmethod(refuse)
    torch.ops.higher_order.__class__ = _Namespace


class _Namespace(_HigherOrderNamespace):
    look_further: Lookup
    refuse: Refuse

    def __getattr__(self, name: str) -> HigherOrderOperator:
        if not name.startswith("_") and name not in _higher_order_ops:
            self.look_further()
            if name not in _higher_order_ops and sys._getframe(1).f_globals.get("__name__") == _LOADER:
                # torch would only say that the file cannot be read.
                return Missing(name, self.refuse)
        return super().__getattr__(name)


class Missing(HigherOrderOperator):
    """Stands in a loaded program for an operator that nobody has defined: it says so when it is called."""

    def __init__(self, name: str, refuse: Refuse) -> None:
        super().__init__(name)  # type: ignore[no-untyped-call] # torch's own
        del _higher_order_ops[name]  # torch registers what is constructed
        self._refuse = refuse

    def __call__(self, /, *args: object, **kwargs: object) -> NoReturn:  # noqa: ARG002 # those of any operator
        """Raise."""
        self._refuse(self.__name__, kwargs)
