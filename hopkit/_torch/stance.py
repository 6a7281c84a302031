"""What Dynamo is to do with compiled functions while hopkit looks at a subgraph (``torch.compiler.set_stance``)."""

from __future__ import annotations

import contextlib
import sys
import threading

import torch

_LOADED = "torch._dynamo"


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
