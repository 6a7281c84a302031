"""Installed plugins: found under the entry-point group ``hopkit``, chosen by the environment, loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points

from hopkit.errors import PluginError
from hopkit.hookspecs import PROJECT
from hopkit.manager import BUILTIN_PLUGINS, Plugins

Complain = Callable[[PluginError], None]
"""Told what is wrong with a plugin that is passed over, or with a variable."""


def chosen(complain: Complain) -> dict[str, EntryPoint]:
    """The installed plugins that are to be loaded, by name.

    ``HOPKIT_PLUGINS`` (names, comma separated; empty: none) and ``HOPKIT_BLOCK`` choose.

    Args:
        complain: Told of a name that several plugins have, and of one that a variable gives in vain.
    """
    found = _found(complain)
    only, block = _names("HOPKIT_PLUGINS"), _names("HOPKIT_BLOCK") or []
    for name in only or ():
        if name not in found and name not in BUILTIN_PLUGINS:
            complain(_in_vain("HOPKIT_PLUGINS", name, "is not installed", "there is nothing to load", found))
    for name in block:
        if name in BUILTIN_PLUGINS:
            why = "without it no op would work in this mode"
            complain(_in_vain("HOPKIT_BLOCK", name, "is one of hopkit's own, and stays", why, found))
        elif name not in found:
            complain(_in_vain("HOPKIT_BLOCK", name, "is not installed", "there is nothing to keep out", found))
    return {name: entry for name, entry in found.items() if (only is None or name in only) and name not in block}


def load(
    plugins: Plugins,
    entries: Mapping[str, EntryPoint],
    check: Callable[[str], PluginError | None],
    forget: Callable[[str], None],
    complain: Complain,
) -> dict[str, EntryPoint]:
    """Load plugins; one that fails is passed over.

    Args:
        plugins: Where they go.
        entries: The plugins, by name.
        check: Told the name of one that is there, with all others; gives what is wrong with it.
        forget: Told the module of one that failed: what it defined is to be taken back.
        complain: Told why it failed.

    Returns:
        Those that are just being imported (it is their module that calls), and are left for later.
    """
    left: dict[str, EntryPoint] = {}
    loaded: list[str] = []

    def fail(name: str, error: PluginError) -> None:
        forget(entries[name].module)
        plugins.fail(name, _origin(entries[name]), error)
        complain(error)

    try:
        for name, entry in entries.items():
            if _being_imported(entry.module):
                left[name] = entry
                continue
            try:
                plugins.add(_import(entry), name, _origin(entry))
                loaded.append(name)
            except PluginError as fault:
                fail(name, fault)
        # Only now are all modes known: one plugin may answer for a mode that another brought, and fall with it.
        while faults := [(name, error) for name in loaded if (error := check(name))]:
            for name, error in faults:
                loaded.remove(name)
                plugins.unregister(name)
                fail(name, error)
    except BaseException:  # interrupted: whoever needs them next begins again
        for name in loaded:
            plugins.unregister(name)
        raise
    return left


def _import(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a plugin raises is its own, sys.exit() too, and must not stop the others
        raise PluginError(
            f"plugin '{entry.name}'",
            f"cannot be imported: {entry.value} raised {type(error).__name__}: {error}",
            why="hopkit goes on without it",
            todo=f"Mend or uninstall it, or set HOPKIT_BLOCK={entry.name}",
        ) from error


def _being_imported(module: str) -> bool:
    """Whether a module is half there. Its hooks may be the other half."""
    return bool(getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False))


def _found(complain: Complain) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=PROJECT):
        first = found.setdefault(entry.name, entry)
        if entry.value != first.value:
            complain(
                PluginError(
                    f"plugin '{entry.name}' ({entry.value}, from {_origin(entry)[0]})",
                    f"is passed over: {first.value}, from {_origin(first)[0]}, has this name",
                    why="a plugin is chosen, blocked and overridden by its name",
                    todo="Uninstall one of the two, or ask its author for another entry-point name",
                )
            )
    return found


def _origin(entry: EntryPoint) -> tuple[str, str]:
    """The distribution of an installed plugin, and its version."""
    return (entry.dist.name, entry.dist.version) if entry.dist else ("", "")


def _in_vain(variable: str, name: str, found: str, why: str, installed: Iterable[str]) -> PluginError:
    there = ", ".join(sorted(installed)) or "none"
    return PluginError(variable, f"names plugin '{name}', which {found}", why=why, todo=f"Installed are {there}")


def _names(variable: str) -> list[str] | None:
    value = os.environ.get(variable)
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]
