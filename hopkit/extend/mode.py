"""A mode of a plugin's own: ``hopkit_add_modes`` brings it, and ``hopkit_<name>_rule`` gives ``rule(entry, call)``.

While the rule runs, a dispatch mode is off (``with entry:`` turns it on again); a tensor class and a dispatch key are
not: unwrap the call's inputs before calling it again. ``call.run()`` runs the body; ``call()`` asks the next mode.

Where the mode says ``in_place=True``, a rule takes the place of the body in eager, and gets the author's arguments:
``rule(entry, *args, **kwargs)``. Autograd is active, and a subgraph is the author's own callable.
"""

from __future__ import annotations

from typing import Any, Protocol

from hopkit._torch.keys import DispatchKey, TorchDispatchMode
from hopkit._torch.trees import leaves, map_leaves
from hopkit.call import Call
from hopkit.modes import Mode

__all__ = ["DispatchKey", "InPlaceRule", "Mode", "ModeRule", "TorchDispatchMode", "leaves", "map_leaves"]


class ModeRule(Protocol):
    """Gives the outputs of ``call``. ``entry`` is the active dispatch mode, or the tensor class or dispatch key."""

    def __call__(self, entry: Any, call: Call, /) -> object: ...


class InPlaceRule(Protocol):
    """Gives the op's result, of the structure that the body gives, for tensors of the class ``entry``."""

    def __call__(self, entry: Any, /, *args: Any, **kwargs: Any) -> object: ...
