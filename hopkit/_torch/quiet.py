"""What torch does on the side while it compiles, and what nobody reads in a test (2.13, 2.14).

If a name is gone, leave its line out.
"""

from __future__ import annotations

import logging

from torch._C._dynamo import guards


def compile_quietly() -> None:
    """From now on, if the compiler is not loaded yet, torch writes no trace of a compilation and times no guards.

    It writes one for pytest, which listens to every logger that keeps to itself. It times guards with empty caches of
    the processor, which takes longer than to compile little.
    """
    trace = logging.getLogger("torch.__trace")
    trace.handlers.clear()  # the one that there is waits for a folder to write to
    trace.propagate = True
    guards.profile_guard_manager = lambda *_: 0.0
