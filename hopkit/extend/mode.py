"""A mode of a plugin's own: ``hopkit_add_modes`` brings it, and ``hopkit_<name>_rule`` gives ``rule(entry, call)``.

While the rule runs, a dispatch mode is off (``with entry:`` turns it on again); a tensor class and a dispatch key are
not: unwrap the call's inputs before calling it again. ``call.run()`` runs the body; ``call()`` asks the next mode.
"""

from __future__ import annotations

from typing import Any, Protocol

from hopkit._torch.keys import DispatchKey, TorchDispatchMode
from hopkit.call import Call
from hopkit.modes import Mode

__all__ = ["DispatchKey", "Mode", "ModeRule", "TorchDispatchMode"]


class ModeRule(Protocol):
    """Gives the outputs of ``call``. ``entry`` is the active dispatch mode, or the tensor class or dispatch key."""

    def __call__(self, entry: Any, call: Call, /) -> object: ...
