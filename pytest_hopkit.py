"""hopkit's pytest plugin: ``@pytest.mark.hopkit(op=op)`` makes one test per mode and sample, and `hopkit_cell` runs it.

It stands outside the package because pytest imports it in every run, and ``import hopkit`` loads torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hopkit.kit import Kit
    from hopkit.testing import Trial


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "hopkit(*, op, samples=None, modes=None): run the test once per mode and sample of the op; see `hopkit_cell`",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per cell, where a test takes `hopkit_cell` and has the marker."""
    marker = metafunc.definition.get_closest_marker("hopkit")
    if marker is None or "hopkit_cell" not in metafunc.fixturenames:
        return
    if "op" not in marker.kwargs:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: write @pytest.mark.hopkit(op=...), by keyword")
    trials = importlib.import_module("hopkit.testing").plan(**marker.kwargs)
    metafunc.parametrize("hopkit_cell", trials, ids=str, indirect=True)


@pytest.fixture
def hopkit_cell(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Run one cell, and fail where the op is not what its body is.

    A cell that has no answer, because the op refuses or the mode does not apply, skips the test and says why.
    """
    trial: Trial | None = getattr(request, "param", None)
    if trial is None:
        raise pytest.UsageError("hopkit_cell needs @pytest.mark.hopkit(op=...) on the test")

    def run() -> None:
        cell = trial.run()
        if not cell.ok:
            pytest.fail(str(cell), pytrace=False)
        if cell.verdict != "right":
            pytest.skip(str(cell))

    return run


@pytest.fixture
def hopkit_fresh() -> Iterator[Kit]:
    """A host of its own: the built-in plugins alone, and ops that are undefined after the test."""
    with importlib.import_module("hopkit.testing").fresh() as kit:
        yield kit
