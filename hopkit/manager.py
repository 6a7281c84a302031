"""Plugins: found, loaded, validated, listed. A thin typed host over pluggy."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points, version

import pluggy

from hopkit._torch import keys
from hopkit.errors import PluginError
from hopkit.hookspecs import PROJECT, Hooks
from hopkit.modes import BUILTIN, Mode

BUILTIN_PLUGINS = tuple(f"hopkit.rules.{mode.name}" for mode in BUILTIN if mode.open)

_TAKES = {
    hook: tuple(inspect.signature(function).parameters)[1:]
    for hook, function in vars(Hooks).items()
    if hook.startswith("hopkit_")
}
"""What every hook is passed, by name. The hook of a mode that a plugin adds is not here: it is passed ``op``."""

Complain = Callable[[PluginError], None]
"""Told what is wrong with a plugin that was passed over."""


@dataclasses.dataclass(frozen=True)
class PluginInfo:
    """One plugin, as ``hopkit plugins`` lists it.

    Args:
        name: Its name with hopkit.
        distribution: What was installed to get it, or "".
        version: The distribution's version, or "".
        hooks: The hooks it answers.
        modes: The modes it brings.
        ops: The ops it brings, by torch's names.
        error: Why it is not loaded, or "".
    """

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    error: str = ""

    @property
    def builtin(self) -> bool:
        """Whether hopkit brings it."""
        return self.name in BUILTIN_PLUGINS


@dataclasses.dataclass(frozen=True)
class Impl:
    """One plugin's function for one hook.

    Args:
        plugin: Whose it is.
        hook: What it answers.
        function: The function.
        takes: The names of the arguments that it wants; a hook need not want all.
        ops: The ops it is limited to. Empty: it answers for any.
        overrides: The plugins that it goes before.
    """

    plugin: str
    hook: str
    function: Callable[..., object]
    takes: tuple[str, ...]
    ops: tuple[str, ...]
    overrides: tuple[str, ...]

    def ask(self, **given: object) -> object:
        """What the plugin answers.

        Raises:
            PluginError: It raised.
        """
        try:
            return self.function(**{name: given[name] for name in self.takes})
        except Exception as error:  # whatever a plugin raises is its own
            asked = f" (asked for {given['op']!r})" if "op" in given else ""
            raise PluginError(
                f"plugin '{self.plugin}', hook '{self.hook}'",
                f"raised {type(error).__name__}: {error}{asked}",
                why="hopkit cannot tell what the plugin answers",
                todo="Mend it, return None for ops that it does not know, or block the plugin with HOPKIT_BLOCK",
            ) from error


class Plugins:
    """The plugins of one host: the built-in ones, the installed ones, and those registered by hand."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Hooks)
        self._added: dict[str, tuple[Mode, ...]] = {}
        self._origins: dict[str, tuple[str, str]] = dict.fromkeys(BUILTIN_PLUGINS, (PROJECT, version(PROJECT)))
        self._failed: dict[str, PluginInfo] = {}
        for name in BUILTIN_PLUGINS:
            self._manager.register(importlib.import_module(name), name)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The table of modes, with those that plugins brought first: torch asks them before anything built in."""
        return (*(mode for modes in self._added.values() for mode in modes), *BUILTIN)

    @property
    def menu(self) -> list[str]:
        """Every hook that there is."""
        lifecycle = [hook for hook in _TAKES if not hook.endswith("_rule")]
        return sorted([*lifecycle, *(f"hopkit_{mode.name}_rule" for mode in self.modes if mode.open)])

    # -- installed plugins -------------------------------------------------------------------------------------------

    def load_installed(self, forget: Callable[[str], None], complain: Complain) -> bool:
        """Load what is installed under the entry-point group ``hopkit``; a plugin that fails is passed over.

        ``HOPKIT_PLUGINS`` (names, comma separated; empty: none) and ``HOPKIT_BLOCK`` choose.

        Args:
            forget: Told the module of a plugin that failed: what it defined is to be taken back.
            complain: Told why it failed.

        Returns:
            Whether all are there. A plugin that is just being imported (it is its module that calls) is left for later.
        """
        found, complete = _installed(complain), True
        only, block = _names("HOPKIT_PLUGINS"), _names("HOPKIT_BLOCK") or ()
        for name in [*(n for n in only or () if n not in found), *(n for n in block if n in BUILTIN_PLUGINS)]:
            complain(_not_choosable(name, found))
        loaded: list[str] = []

        def fail(name: str, error: PluginError) -> None:
            forget(found[name].module)
            self._failed[name] = PluginInfo(name, *_origin(found[name]), error=str(error))
            complain(error)

        for name, entry in found.items():
            known = name in self._failed or self._manager.has_plugin(name)
            if known or name in block or (only is not None and name not in only):
                continue
            if _being_imported(entry.module):
                complete = False
                continue
            try:
                self._add(_import(entry), name)
            except PluginError as fault:
                fail(name, fault)
            else:
                self._origins[name] = _origin(entry)
                loaded.append(name)
        # Only now are all modes known: one plugin may answer for a mode that another brought, and fall with it.
        while faults := [(name, error) for name in loaded if (error := self._fault(name))]:
            for name, error in faults:
                loaded.remove(name)
                self.unregister(name)
                fail(name, error)
        return complete

    # -- one plugin --------------------------------------------------------------------------------------------------

    def register(self, plugin: object, name: str | None = None) -> str:
        """Register a module or object by hand; gives its name.

        Raises:
            PluginError: It is registered already, or answers no hook rightly. Nothing has changed then.
        """
        chosen = name or getattr(plugin, "__name__", None) or type(plugin).__qualname__
        self._add(plugin, chosen)
        if fault := self._fault(chosen) or self._idle(chosen):
            self.unregister(chosen)
            raise fault
        return chosen

    def _add(self, plugin: object, name: str) -> None:
        if self._manager.has_plugin(name) or self._manager.is_registered(plugin):
            raise PluginError(
                f"plugin '{name}'",
                "is registered already",
                why="its rules would be asked twice",
                todo="Unregister it first with `hopkit.unregister`, or give this one another name",
            )
        self._check_arguments(plugin, name)
        self._manager.register(plugin, name)
        try:
            self._add_modes(name)
        except PluginError:
            self.unregister(name)
            raise

    def unregister(self, name: str) -> None:
        """Forget a plugin, and the modes it brought."""
        self._manager.unregister(name=name)
        self._added.pop(name, None)
        self._origins.pop(name, None)

    def name_of(self, plugin: object) -> str:
        """The name of a registered plugin, or of one given by name.

        Raises:
            PluginError: There is none, or it is one of hopkit's own.
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

    def _add_modes(self, name: str) -> None:
        for impl in self.impls("hopkit_add_modes"):
            if impl.plugin != name:
                continue
            given = impl.ask()
            for mode in given if isinstance(given, Iterable) else [given]:
                if not isinstance(mode, Mode) or not mode.name.isidentifier() or not keys.is_entry(mode.entry):
                    raise PluginError(
                        f"plugin '{name}', hook 'hopkit_add_modes'",
                        f"gave {mode!r}",
                        why="torch asks dispatch mode classes, tensor classes with __torch_dispatch__, dispatch keys",
                        todo="Give a list of hopkit.extend.Mode(name, entry=MyMode, gives='...')",
                    )
                if any(mode.name == known.name or mode.entry is known.entry for known in self.modes):
                    raise PluginError(
                        f"plugin '{name}', hook 'hopkit_add_modes'",
                        f"brings the mode '{mode.name}' ({mode.entry!r}), which is there already",
                        why="two modes under one name or one entry could not be told apart",
                        todo="Choose another name, or answer the hook of the mode that is there",
                    )
                self._added[name] = (*self._added.get(name, ()), mode)

    # -- validation --------------------------------------------------------------------------------------------------

    def _check_arguments(self, plugin: object, name: str) -> None:
        """Before pluggy does: its message does not say what was expected, and it knows no hook of an added mode."""
        for hook in self._marked(plugin):
            parameters = inspect.signature(getattr(plugin, hook)).parameters.values()
            takes = _TAKES.get(hook, ("op",))
            if any(p.name not in takes for p in parameters if p.default is p.empty):
                raise PluginError(
                    f"plugin '{name}', hook '{hook}'",
                    f"takes ({', '.join(map(str, parameters))})",
                    why="arguments of hooks are passed by their names",
                    todo=f"Write `def {hook}({', '.join(takes)})`",
                )

    def _marked(self, plugin: object) -> list[str]:
        return [name for name in dir(plugin) if self._manager.parse_hookimpl_opts(plugin, name) is not None]

    def _fault(self, name: str) -> PluginError | None:
        """What of a plugin would never be asked: a hook that is misspelt, not marked, or of a mode nobody brought."""
        plugin = self._manager.get_plugin(name)
        marked, menu = self._marked(plugin), self.menu
        for attribute in sorted({*marked, *(a for a in dir(plugin) if a.startswith("hopkit_"))}):
            value = inspect.getattr_static(plugin, attribute, None)
            if attribute in marked:
                wrong = attribute not in menu
            else:
                wrong = attribute in menu or callable(getattr(value, "__func__", value))
            if wrong:
                close = difflib.get_close_matches(attribute, menu, 1)
                meant = f"; did you mean '{close[0]}'?" if close else ""
                found = "is not a function marked with @hookimpl" if attribute in menu else f"is no hook{meant}"
                return PluginError(
                    f"plugin '{name}'",
                    f"has '{attribute}', which {found}",
                    why="it would never be asked",
                    todo=f"The hooks are {', '.join(menu)}",
                )
        return None

    def _idle(self, name: str) -> PluginError | None:
        if self._manager.get_hookcallers(self._manager.get_plugin(name)):
            return None
        return PluginError(
            f"plugin '{name}'",
            "answers no hook",
            why="registering it would change nothing",
            todo="Mark its functions with @hopkit.hookimpl, and give the module or object that has them",
        )

    # -- questions ---------------------------------------------------------------------------------------------------

    def impls(self, hook: str) -> Iterator[Impl]:
        """Who answers a hook: plugins first, built-in ones last."""
        caller: pluggy.HookCaller | None = getattr(self._manager.hook, hook, None)
        for impl in reversed(caller.get_hookimpls() if caller else ()):
            marks = [getattr(impl.function, mark, ()) for mark in ("hopkit_op", "hopkit_overrides")]
            yield Impl(impl.plugin_name, hook, impl.function, tuple(impl.argnames), *marks)

    def infos(self, ops: Mapping[str, str]) -> tuple[PluginInfo, ...]:
        """Every plugin, those that failed to load included.

        Args:
            ops: The ops that plugins bring, each with its plugin's name.
        """
        found = [
            PluginInfo(
                name,
                *self._origins.get(name, ("", "")),
                hooks=tuple(sorted(caller.name for caller in self._manager.get_hookcallers(plugin) or ())),
                modes=tuple(mode.name for mode in self._added.get(name, ())),
                ops=tuple(op for op, owner in ops.items() if owner == name),
            )
            for name, plugin in self._manager.list_name_plugin()
        ]
        return (*found, *self._failed.values())


def _import(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except Exception as error:  # whatever a plugin raises is its own, and must not stop the others
        raise PluginError(
            f"plugin '{entry.name}'",
            f"cannot be imported: {entry.value} raised {type(error).__name__}: {error}",
            why="hopkit goes on without it",
            todo=f"Mend or uninstall it, or set HOPKIT_BLOCK={entry.name}",
        ) from error


def _being_imported(module: str) -> bool:
    """Whether a module is half there. Its hooks may be the other half."""
    return bool(getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False))


def _installed(complain: Complain) -> dict[str, EntryPoint]:
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


def _not_choosable(name: str, found: Iterable[str]) -> PluginError:
    builtin = name in BUILTIN_PLUGINS
    return PluginError(
        f"plugin '{name}'",
        "is one of hopkit's own, and stays" if builtin else "is named in HOPKIT_PLUGINS, and is not installed",
        why="without it no op would work in this mode" if builtin else "it cannot answer",
        todo=f"Installed are {', '.join(sorted(found)) or 'none'}",
    )


def _names(variable: str) -> list[str] | None:
    value = os.environ.get(variable)
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]
