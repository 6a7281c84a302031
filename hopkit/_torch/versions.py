"""The releases of torch that the suite runs on."""

from __future__ import annotations

import warnings

from hopkit.errors import HopkitWarning

TESTED = ("2.13", "2.14")


def check(version: str) -> None:
    """Warn of a torch that is newer than what was tested.

    Raises:
        ImportError: It is older than hopkit can use.
    """
    major, minor, *_ = version.split(".")
    release = (int(major), int(minor))
    oldest, *_, newest = (tuple(map(int, tested.split("."))) for tested in TESTED)
    if release < oldest:
        raise ImportError(f"hopkit needs torch {TESTED[0]} or newer, and this is torch {version}")
    if release > newest:
        warnings.warn(
            f"hopkit was tested with torch {', '.join(TESTED)}, and this is torch {version}. It uses names that torch "
            "does not promise to keep; tests/contract/test_canary.py says what was lost.",
            HopkitWarning,
            stacklevel=2,
        )
