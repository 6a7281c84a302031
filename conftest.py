"""Helpers are imported (``tests.samples``), and fixtures are those of hopkit's pytest plugin; here is what has no name.

Nothing that an earlier run compiled is taken from torch's caches: it was made by another hopkit. No test starts a
compiler of hopkit's own, or writes to the user's cache, but those that are about that.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from hopkit._torch.quiet import compile_quietly

compile_quietly()
gc.set_threshold(50_000)  # at 700, a tenth of the time goes into looking through graphs of torch that are alive


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("HOPKIT_NATIVE", "0")
        yield
