"""Where an op comes from: kept in its nodes, for a process that has a node and not the op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata

Origin = tuple[str, str]
"""The module that defines an op, and its distribution as ``name==version``, "" where it belongs to none."""


def origin(function: Callable[..., object]) -> Origin:
    """Where a function comes from."""
    module = getattr(function, "__module__", None) or ""
    return module, _distribution(module.partition(".")[0])


@functools.cache
def _distribution(top: str) -> str:
    # One that is installed as its sources lists no modules; its entry points do.
    plugins = (entry for entry in metadata.entry_points(group="hopkit") if entry.module.partition(".")[0] == top)
    found = next((entry.dist for entry in plugins if entry.dist), None)
    if found is None:
        found = next(map(metadata.distribution, metadata.packages_distributions().get(top, ())), None)
    return f"{found.name}=={found.version}" if found else ""


def how_to_get(found: Origin) -> str:
    """What to do where the op is missing."""
    module, distribution = found
    name = distribution.partition("==")[0]
    if name and not _installed(name):
        return f"Install {distribution}, which defined the op when the program was saved"
    if module and module != "__main__":
        return f"Import {module}, which defined the op when the program was saved, before you load it"
    return "Install the package that defines the op, or import the module that does, before you load the program"


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
