"""Plugins: registered, validated, asked, listed. A thin typed host over pluggy."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Literal

import pluggy

from hopkit._torch import keys
from hopkit.errors import PluginError
from hopkit.hookspecs import PROJECT, Hooks
from hopkit.modes import BUILTIN, Mode
from hopkit.spec import OpSpec

BUILTIN_PLUGINS = tuple(f"hopkit.rules.{mode.name}" for mode in BUILTIN if mode.open)

_TAKES = {
    hook: tuple(inspect.signature(function).parameters)[1:]
    for hook, function in vars(Hooks).items()
    if hook.startswith("hopkit_")
}
"""What every hook is passed, by name. The hook of a mode that a plugin adds is not here: it is passed ``op``."""

State = Literal["loaded", "faulty", "failed"]


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
        error: What is wrong with it, or "".
        state: "loaded"; "faulty": it is there, and answers in part, for a hook of it raised or gave what is no rule, or
            another plugin claims the same place; "failed": it is not there.
    """

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    error: str = ""
    state: State = "loaded"

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

    def who(self, op: OpSpec | None = None) -> str:
        """The plugin and the hook, and the op that it was asked about, as messages name them."""
        return f"plugin '{self.plugin}', hook '{self.hook}'" + (f", op '{op.name}'" if op else "")

    def ask(self, op: OpSpec | None = None, **given: object) -> object:
        """What the plugin answers.

        Raises:
            PluginError: It raised.
        """
        given["op"] = op
        try:
            answer = self.function(**{name: given[name] for name in self.takes})
            return list(answer) if isinstance(answer, Iterator) else answer  # a generator runs when it is read
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a plugin raises is its own
            raise PluginError(
                self.who(op),
                f"raised {type(error).__name__}: {error}",
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
        self._faults: dict[str, dict[str, PluginError]] = {}
        self._failed: dict[str, PluginInfo] = {}
        self.brought: dict[str, tuple[str, ...]] = {}
        """The ops that each plugin brings, by torch's names."""
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

    # -- one plugin --------------------------------------------------------------------------------------------------

    def register(self, plugin: object, name: str | None = None) -> str:
        """Register a module or object by hand; gives its name.

        Raises:
            PluginError: It is registered already, or answers no hook rightly. Nothing has changed then.
        """
        chosen = name or getattr(plugin, "__name__", None) or type(plugin).__qualname__
        self.add(plugin, chosen)
        if fault := self.fault(chosen) or self._idle(chosen):
            self.unregister(chosen)
            raise fault
        return chosen

    def add(self, plugin: object, name: str, origin: tuple[str, str] = ("", "")) -> None:
        """Let a plugin in whose hooks take the right arguments. Whether they are hooks at all is for `fault` to say.

        Args:
            plugin: The plugin.
            name: Its name.
            origin: Its distribution, and that one's version.

        Raises:
            PluginError: It is registered already, or answers no hook rightly. Nothing has changed then.
        """
        if self._manager.has_plugin(name) or self._manager.is_registered(plugin):
            raise PluginError(
                f"plugin '{name}'",
                "is registered already",
                why="its rules would be asked twice",
                todo="Unregister it first with `hopkit.unregister`, or give this one another name",
            )
        self._check_arguments(plugin, name)
        self._manager.register(plugin, name)
        self._origins[name] = origin
        try:
            self._add_modes(name)
        except PluginError:
            self.unregister(name)
            raise

    def unregister(self, name: str) -> None:
        """Forget a plugin, and what it brought."""
        self._manager.unregister(name=name)
        for known in (self._added, self._origins, self._faults, self.brought):
            known.pop(name, None)

    def fail(self, name: str, origin: tuple[str, str], error: PluginError) -> None:
        """List a plugin that cannot be used, and is not there."""
        self._failed[name] = PluginInfo(name, *origin, error=str(error), state="failed")

    def blame(self, name: str, error: PluginError) -> bool:
        """Remember what went wrong with a plugin that stays; gives whether it is news."""
        known = self._faults.setdefault(name, {})
        return known.setdefault(error.who, error) is error

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
                if mode.in_place and not keys.is_tensor_class(mode.entry):
                    raise PluginError(
                        f"plugin '{name}', hook 'hopkit_add_modes'",
                        f"gave {mode!r}",
                        why="a rule in place of the body is asked for by a tensor among the operands",
                        todo="Give it a subclass of torch.Tensor as its entry, or leave out `in_place`",
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

    def fault(self, name: str) -> PluginError | None:
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

    def impls(self, hook: str, op: str = "") -> Iterator[Impl]:
        """Who answers a hook (for an op): plugins first, built-in ones last."""
        caller: pluggy.HookCaller | None = getattr(self._manager.hook, hook, None)
        for impl in reversed(caller.get_hookimpls() if caller else ()):
            ops, overrides = (getattr(impl.function, mark, ()) for mark in ("hopkit_op", "hopkit_overrides"))
            if not op or not ops or op in ops:
                yield Impl(impl.plugin_name, hook, impl.function, tuple(impl.argnames), ops, overrides)

    def infos(self, ops: Mapping[str, str], conflicts: Mapping[str, Sequence[PluginError]]) -> tuple[PluginInfo, ...]:
        """Every plugin, those that failed to load included.

        Args:
            ops: The ops that plugins bring, each with its plugin's name.
            conflicts: For every plugin that claims what another claims, the errors.
        """
        found = []
        for name, plugin in self._manager.list_name_plugin():
            errors = [*self._faults.get(name, {}).values(), *conflicts.get(name, ())]
            info = PluginInfo(
                name,
                *self._origins[name],
                hooks=tuple(sorted(caller.name for caller in self._manager.get_hookcallers(plugin) or ())),
                modes=tuple(mode.name for mode in self._added.get(name, ())),
                ops=tuple(op for op, owner in ops.items() if owner == name),
                error=_first(errors),
                state="faulty" if errors else "loaded",
            )
            found.append(info)
        return (*found, *self._failed.values())


def _first(errors: Sequence[PluginError]) -> str:
    more = f" (And {len(errors) - 1} more.)" if len(errors) > 1 else ""
    return f"{errors[0]}{more}" if errors else ""
