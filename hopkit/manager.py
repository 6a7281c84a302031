"""Plugins: found, loaded, validated, listed. A thin typed host over pluggy."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import cast

import pluggy

from hopkit._torch import keys
from hopkit.errors import HopkitWarning, PluginError
from hopkit.hookspecs import PROJECT, Hooks, hookspec
from hopkit.modes import BUILTIN, Mode

BUILTIN_PLUGINS = tuple(f"hopkit.rules.{mode.name}" for mode in BUILTIN if mode.open)


@dataclasses.dataclass(frozen=True)
class PluginInfo:
    """One plugin, as ``hopkit plugins`` lists it.

    Args:
        name: Its name with hopkit.
        distribution: What was installed to get it, or "".
        version: The distribution's version, or "".
        hooks: The hooks it answers.
        error: Why it is not loaded, or "".
    """

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()
    error: str = ""

    @property
    def builtin(self) -> bool:
        """Whether hopkit brings it."""
        return self.name in BUILTIN_PLUGINS


@dataclasses.dataclass(frozen=True)
class Impl:
    """One plugin's function for one hook."""

    plugin: str
    hook: str
    function: Callable[..., object]
    op: str | None
    overrides: str | None


class Plugins:
    """The plugins of one host: the built-in ones, the installed ones, and those registered by hand."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Hooks)
        self._added: dict[str, tuple[str, Mode]] = {}
        self._distributions: dict[str, Distribution] = {}
        self._failed: dict[str, PluginInfo] = {}
        for name in BUILTIN_PLUGINS:
            self._manager.register(importlib.import_module(name), name)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The table of modes, with those that plugins brought first: torch asks them before anything built in."""
        return (*(mode for _, mode in self._added.values()), *BUILTIN)

    def load_installed(self) -> None:
        """Load what is installed under the entry-point group ``hopkit``.

        ``HOPKIT_PLUGINS`` (names, comma separated; empty: none) and ``HOPKIT_BLOCK`` choose. A plugin that fails is
        reported by name, in a warning and in the listing; the others load.
        """
        only, block = _names("HOPKIT_PLUGINS"), _names("HOPKIT_BLOCK") or set()
        loaded: list[str] = []
        for distribution, entry in _entry_points():
            if entry.name in block or (only is not None and entry.name not in only):
                continue
            if self._manager.has_plugin(entry.name):
                continue
            try:
                self._register(entry.load(), entry.name)
            except Exception as error:  # whatever a plugin raises is its own, and must not stop the others
                self._fail(entry.name, distribution, error)
            else:
                self._distributions[entry.name] = distribution
                loaded.append(entry.name)
        # Only now are all modes known: one plugin may answer for a mode that another brought.
        for name in loaded:
            try:
                self.validate(name)
            except PluginError as error:
                self.unregister(name)
                self._fail(name, self._distributions.pop(name, None), error)

    def _fail(self, name: str, distribution: Distribution | None, error: Exception) -> None:
        told = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        known = (distribution.metadata["Name"], distribution.version) if distribution else ("", "")
        self._failed[name] = PluginInfo(name, *known, error=told)
        warnings.warn(f"plugin '{name}' is not loaded: {told}", HopkitWarning, stacklevel=2)

    def register(self, plugin: object, name: str | None = None) -> str:
        """Register a module or object by hand; gives its name.

        Raises:
            PluginError: It is registered already, or answers no hook rightly. Nothing has changed then.
        """
        chosen = name or getattr(plugin, "__name__", None) or type(plugin).__qualname__
        self._register(plugin, chosen)
        try:
            self.validate(chosen)
        except PluginError:
            self.unregister(chosen)
            raise
        return chosen

    def _register(self, plugin: object, name: str) -> None:
        if self._manager.has_plugin(name) or self._manager.is_registered(plugin):
            raise PluginError(
                f"plugin '{name}'",
                "is registered already",
                why="its rules would be asked twice",
                todo="Unregister it first with `hopkit.unregister`, or give this one another name",
            )
        try:
            self._manager.register(plugin, name)
            self._add_modes(plugin, name)
        except PluginError:
            self.unregister(name)
            raise
        except Exception as error:  # pluggy's own, or the plugin's
            self.unregister(name)
            raise PluginError(
                f"plugin '{name}'",
                f"cannot be registered: {error}",
                why="a plugin that is half there would answer for half of the ops",
                todo="See docs/reference/hooks.md for what each hook takes and gives",
            ) from error

    def unregister(self, name: str) -> None:
        """Forget a plugin, and the modes it brought."""
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)
        for mode in [mode for mode, (owner, _) in self._added.items() if owner == name]:
            del self._added[mode]

    def name_of(self, plugin: object) -> str:
        """The name of a registered plugin, or of one given by name.

        Raises:
            PluginError: There is none.
        """
        name = plugin if isinstance(plugin, str) else self._manager.get_name(plugin)
        if name is None or not self._manager.has_plugin(name):
            raise PluginError(
                f"plugin {plugin!r}",
                "is not registered",
                why="there is nothing to take away",
                todo=f"Registered are {', '.join(n for n, _ in self._manager.list_name_plugin())}",
            )
        if name in BUILTIN_PLUGINS:
            raise PluginError(
                f"plugin '{name}'",
                "is one of hopkit's own",
                why="without it no op would work in this mode",
                todo="Register a plugin that answers before it instead",
            )
        return name

    def _add_modes(self, plugin: object, name: str) -> None:
        function = getattr(plugin, "hopkit_add_modes", None)
        if function is None or not hasattr(function, "hopkit_impl"):
            return
        for mode in cast("Iterable[Mode]", function()):
            if not isinstance(mode, Mode) or not keys.is_entry(mode.entry):
                raise PluginError(
                    f"plugin '{name}', hook 'hopkit_add_modes'",
                    f"gave {mode!r}",
                    why="torch looks for kernels under classes of modes, subclasses of Tensor, and dispatch keys",
                    todo="Give hopkit.extend.Mode(name, entry=MyMode, gives='...')",
                )
            if any(mode.name == known.name or mode.entry is known.entry for known in self.modes):
                raise PluginError(
                    f"plugin '{name}', hook 'hopkit_add_modes'",
                    f"brings the mode '{mode.name}' ({mode.entry!r}), which is there already",
                    why="two modes under one name or one entry could not be told apart",
                    todo="Choose another name, or answer the hook of the mode that is there",
                )
            self._added[mode.name] = (name, mode)
            hook = f"hopkit_{mode.name}_rule"
            if not hasattr(self._manager.hook, hook) or not getattr(self._manager.hook, hook).has_spec():
                self._manager.add_hookspecs(_rule_hook(hook))

    def validate(self, name: str) -> None:
        """Check every hook of a plugin against the menu.

        Raises:
            PluginError: A hook is misspelt, takes other arguments, or answers for a mode that nobody brought.
        """
        plugin = self._manager.get_plugin(name)
        known = {hook for hook in dir(self._manager.hook) if not hook.startswith("_")}
        specified = sorted(h for h in known if getattr(self._manager.hook, h).has_spec())
        for attribute in dir(plugin):
            function = inspect.getattr_static(plugin, attribute)
            marked = hasattr(getattr(function, "__func__", function), "hopkit_impl")
            if not (marked or attribute.startswith("hopkit_")) or (attribute in specified and marked):
                continue
            if not marked and attribute not in specified and not callable(function):
                continue
            close = difflib.get_close_matches(attribute, specified, 1)
            meant = f"; did you mean '{close[0]}'?" if close and attribute not in specified else ""
            found = "is not marked with @hookimpl" if attribute in specified else f"is no hook of hopkit{meant}"
            raise PluginError(
                f"plugin '{name}'",
                f"has '{attribute}', which {found}",
                why="it would never be asked",
                todo=f"The hooks are {', '.join(specified)}",
            )

    def impls(self, hook: str) -> Iterator[Impl]:
        """Who answers a hook: plugins first, built-in ones last."""
        caller = getattr(self._manager.hook, hook, None)
        for impl in reversed(caller.get_hookimpls() if caller else ()):
            function = impl.function
            yield Impl(
                impl.plugin_name,
                hook,
                function,
                getattr(function, "hopkit_op", None),
                getattr(function, "hopkit_overrides", None),
            )

    def infos(self) -> tuple[PluginInfo, ...]:
        """Every plugin, those that failed to load included."""
        found = [self._info(name, plugin) for name, plugin in self._manager.list_name_plugin() if plugin is not None]
        return (*found, *self._failed.values())

    def _info(self, name: str, plugin: object) -> PluginInfo:
        hooks = tuple(sorted(c.name for c in self._manager.get_hookcallers(plugin) or ()))
        distribution = self._distributions.get(name)
        if name in BUILTIN_PLUGINS:
            distribution = Distribution.from_name("hopkit")
        if distribution is None:
            return PluginInfo(name, hooks=hooks)
        return PluginInfo(name, distribution.metadata["Name"], distribution.version, hooks)


def _rule_hook(name: str) -> object:
    def hook(op: object) -> object:
        """How ``op`` behaves in a mode that a plugin brought."""

    hook.__name__ = name
    return type("AddedHook", (), {name: staticmethod(hookspec(hook))})


def _entry_points() -> Iterator[tuple[Distribution, EntryPoint]]:
    seen: set[str] = set()
    for distribution in distributions():
        for entry in distribution.entry_points:
            if entry.group == PROJECT and entry.name not in seen:
                seen.add(entry.name)
                yield distribution, entry


def _names(variable: str) -> set[str] | None:
    value = os.environ.get(variable)
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}
