"""The host: the ops and the plugins of one process, and the tables that connect them."""

from __future__ import annotations

import contextlib
import functools
import keyword
import threading
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from importlib.metadata import EntryPoint
from typing import Concatenate, TypeVar

from typing_extensions import ParamSpec

from hopkit import installed, saved
from hopkit._torch import namespace, serde
from hopkit._torch.fakes import outside_modes
from hopkit._torch.operator import taken
from hopkit.errors import DuplicateOpError, HopkitWarning, PluginError, SpecError
from hopkit.manager import PluginInfo, Plugins
from hopkit.op import AnyOp, Op, check_op
from hopkit.resolve import check_rule, conflicts, resolve
from hopkit.rule import Answer, Place, Rule
from hopkit.spec import OpSpec

P = ParamSpec("P")
R = TypeVar("R")


def _alone(
    method: Callable[Concatenate[Kit, P], R],
) -> Callable[Concatenate[Kit, P], R]:
    """One thread at a time: ops and plugins come and go as a whole. A plugin that is asked may define ops itself."""

    @functools.wraps(method)
    def locked(self: Kit, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with _lock:
            return method(self, *args, **kwargs)

    return locked


_lock = threading.RLock()
"""Of the process, as torch's tables are."""


class Kit:
    """A host. The process has one; tests make their own (`fresh`).

    Args:
        alone: Whether it has the built-in plugins alone, and not those that are installed.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.ops: dict[str, AnyOp] = {}
        self._plugins: Plugins | None = None
        self._entries: dict[str, EntryPoint] | None = {} if alone else None  # None: nobody has looked yet
        self._loading = False
        self._complaints: list[str] = []
        self._early: list[tuple[AnyOp, str, Rule, str]] = []

    # Built when first needed: importing hopkit must stay light.
    @property
    def plugins(self) -> Plugins:
        """The plugins, as far as they are loaded."""
        if self._plugins is None:
            self._plugins = Plugins()
        return self._plugins

    @property
    def _waiting(self) -> bool:
        """Whether installed plugins are still to be loaded."""
        return self._entries is None or bool(self._entries)

    @_alone
    def load(self) -> None:
        """Load the installed plugins, once, and let all ops follow."""
        if self._loading:  # a plugin calls an op while it is imported
            return
        if self._waiting:
            self._loading = True
            heard = self._listeners()
            try:
                with outside_modes():
                    if self._entries is None:
                        self._entries = installed.chosen(self._note)
                    left = installed.load(self.plugins, self._entries, self._fault, self._forgetting(), self._note)
                    self._follow()
                    self._announce(self.ops.values(), but=heard)
            finally:
                self._loading = False
            self._entries = left
            self._attach_early()
            if not left:
                for op in self._every_op():
                    op.loaded()
        self._tell()

    def _fault(self, name: str) -> PluginError | None:
        """What is wrong with a plugin that is there, with all others."""
        if fault := self.plugins.fault(name):
            return fault
        try:
            self._bring(name)
        except PluginError as error:
            return error
        return None

    def _forgetting(self) -> Callable[[str], None]:
        """Takes back the ops that a module (or, for "", anybody) has defined since now."""
        before = set(self._every_op())

        def forget(module: str) -> None:
            for op in list(self._every_op()):
                own = not module or f"{op.spec.body.__module__}.".startswith(f"{module}.")
                if own and op not in before and self.ops.get(op.spec.name) is op:
                    self.undefine(op)

        return forget

    def _bring(self, name: str) -> None:
        """Ask a plugin for the ops that it brings; once.

        Raises:
            PluginError: It raised, or gave what is no op.
        """
        if name in self.plugins.brought:
            return
        found: list[str] = []
        for impl in self.plugins.impls("hopkit_add_ops"):
            given = impl.ask() if impl.plugin == name else ()
            for op in given if isinstance(given, Iterable) else [given]:
                if not isinstance(op, Op) or self.ops.get(op.spec.name) is not op:
                    raise PluginError(
                        impl.who(),
                        f"gave {op!r}",
                        why="it is no op that is defined",
                        todo="Give a list of the ops that `hopkit.define` made",
                    )
                found.append(op.spec.name)
        self.plugins.brought[name] = tuple(found)

    def supplied(self) -> dict[str, str]:
        """The ops that plugins bring (``hopkit_add_ops``): torch's name, and the plugin's."""
        return {op: plugin for plugin, ops in self.plugins.brought.items() for op in ops if op in self.ops}

    # -- complaints --------------------------------------------------------------------------------------------------

    def _note(self, error: PluginError) -> None:
        self._complaints.append(str(error))

    def _passing_over(self, plugin: str, error: PluginError) -> None:
        """One plugin must not stop the others."""
        if self.plugins.blame(plugin, error):
            self._note(error)

    def _tell(self) -> None:
        """Warn of what was noted: once everything stands, for a warning may be an error."""
        while self._complaints and not self._loading:
            warnings.warn(self._complaints.pop(0), HopkitWarning, stacklevel=2)

    # -- ops ---------------------------------------------------------------------------------------------------------

    @_alone
    def define(self, spec: OpSpec, *, replace: bool) -> AnyOp:
        """Make the live op of a spec.

        Raises:
            SpecError: The name is no identifier.
            DuplicateOpError: The name is taken.
        """
        self._check_name(spec.name, replace)
        table = resolve(spec, (), self.plugins, self._passing_over)
        op: AnyOp = Op(spec, self.load if self._waiting else None, self.attach)
        try:
            op.install(table, self.plugins.modes)
        except BaseException:
            op.place.fill()  # torch knows an operator from its construction on
            raise
        op.before = self.ops.get(spec.name)
        op.place.fill(op.operator)
        self.ops[spec.name] = op
        self._announce([op])
        self._tell()
        return op

    def _check_name(self, name: str, replace: bool) -> None:
        usable = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
        if not usable or name.startswith("_"):
            raise SpecError(
                f"op {name!r}",
                "has a name that starts with an underscore" if usable else "has a name that is no identifier",
                why="torch knows the op as torch.ops.higher_order.<name>",
                todo="Use ASCII letters, digits and underscores, and prefix the name with your package",
            )
        if taken(name) and not replace:
            whose = "an op of hopkit" if name in self.ops else "an op of torch"
            raise DuplicateOpError(
                f"op '{name}'",
                f"cannot be defined: {whose} has this name",
                why="torch would drop the other without a word",
                todo="Prefix the name with your package, or say `replace=True`",
            )

    def _listeners(self) -> set[str]:
        return {impl.plugin for impl in self.plugins.impls("hopkit_op_defined")}

    def _announce(self, ops: Iterable[AnyOp], *, but: Container[str] = ()) -> None:
        """Tell plugins of ops. One that comes later hears of those that are there."""
        for op in ops:
            for impl in self.plugins.impls("hopkit_op_defined", op.spec.name):
                if impl.plugin not in but:
                    try:
                        impl.ask(op.spec)
                    except PluginError as error:  # the op is defined, whatever a listener thinks of it
                        self._passing_over(impl.plugin, error)

    @_alone
    def undefine(self, op: AnyOp) -> None:
        """Take an op away; what it replaced is back.

        Raises:
            CallError: It is no op.
            SpecError: It is not defined here, or was replaced since.
        """
        check_op("hopkit.undefine()", op)
        if self.ops.get(op.spec.name) is not op:
            raise SpecError(
                f"op '{op.spec.name}'",
                "is not defined, or another op took its name since",
                why="undefining it would take away somebody else's op",
                todo="Undefine the newer op first",
            )
        op.place.fill()
        if op.before is None:
            del self.ops[op.spec.name]
        else:
            self.ops[op.spec.name] = op.before

    @_alone
    def attach(self, op: AnyOp, mode: str, rule: Rule, device: str) -> None:
        """Attach an author's rule.

        Raises:
            PluginError: There is no such mode, it takes no rules, or the rule does not fit it.
        """
        if mode not in {m.name for m in self.plugins.modes}:
            if self._loading:  # one that is still to come may bring it
                self._early.append((op, mode, rule, device))
                return
            self.load()  # an installed plugin may bring it
        known = {m.name: m for m in self.plugins.modes}
        if mode not in known or not known[mode].open:
            raise PluginError(
                f"op '{op.spec.name}'",
                f"cannot have a rule in mode '{mode}'" + (", in which its body runs" if mode in known else ""),
                why="nothing would ever ask it",
                todo=f"Modes that take rules are {', '.join(n for n, m in known.items() if m.open)}",
            )
        check_rule(f"op '{op.spec.name}', rule for '{mode}'", op.spec, known[mode], rule, device)
        author = [*op.author, Answer(mode, rule, Place.AUTHOR, op.spec.body.__module__, device)]
        table = resolve(op.spec, author, self.plugins, self._passing_over)
        op.author[:] = author
        op.install(table, self.plugins.modes)
        self._tell()

    def _attach_early(self) -> None:
        """Attach what authors attached while the plugins were loaded, and a mode was not there yet."""
        while self._early:
            op, mode, rule, device = self._early.pop(0)
            try:
                if self.ops.get(op.spec.name) is op:  # else its plugin failed, and took the op with it
                    self.attach(op, mode, rule, device)
            except PluginError as error:
                self._note(error)

    # -- plugins -----------------------------------------------------------------------------------------------------

    @_alone
    def register(self, plugin: object, name: str | None) -> str:
        """Register a plugin; every op follows. All or nothing.

        Raises:
            PluginError: See `Plugins.register`.
            RuleConflictError: It claims a place that another plugin has.
        """
        self.load()
        heard, forget = self._listeners(), self._forgetting()
        chosen = self.plugins.register(plugin, name)
        try:
            self._bring(chosen)
            self._follow(chosen)
        except BaseException:
            self.plugins.unregister(chosen)
            forget("")
            raise
        self._announce(self.ops.values(), but=heard)
        self._tell()
        return chosen

    @_alone
    def unregister(self, plugin: object) -> None:
        """Take a plugin away; every op follows.

        Raises:
            PluginError: See `Plugins.name_of`.
        """
        self.plugins.unregister(self.plugins.name_of(plugin))
        self._follow()
        self._tell()

    def _follow(self, newcomer: str = "") -> None:
        """Ask again who answers for every op.

        Raises:
            PluginError: The newcomer cannot answer, or claims what another plugin has; nothing has changed then.
        """

        def complain(plugin: str, error: PluginError) -> None:
            if plugin == newcomer:
                raise error
            self._passing_over(plugin, error)

        tables = [(op, resolve(op.spec, op.author, self.plugins, complain)) for op in self._every_op()]
        for _, table in tables:
            for conflict in conflicts(table):
                if newcomer in conflict.plugins:
                    raise conflict.error()
        for op, table in tables:
            op.install(table, self.plugins.modes)

    def _every_op(self) -> Iterator[AnyOp]:
        """Every op, newest first under one name: one that was replaced may still be called, and may come back."""
        for newest in list(self.ops.values()):
            op: AnyOp | None = newest
            while op is not None:
                yield op
                op = op.before

    @_alone
    def infos(self) -> tuple[PluginInfo, ...]:
        """Every plugin."""
        self.load()
        claims: dict[str, list[PluginError]] = {}
        for op in self._every_op():
            for conflict in conflicts(op.table):
                for name in conflict.plugins:
                    claims.setdefault(name, []).append(conflict.error())
        return self.plugins.infos(self.supplied(), claims)


_kit = Kit()


def current() -> Kit:
    """The host of this process."""
    return _kit


namespace.watch(lambda: current().load())
serde.watch(lambda node: saved.check(node, {name: op.spec for name, op in current().ops.items()}))


@contextlib.contextmanager
def fresh() -> Iterator[Kit]:
    """A host of its own, with the built-in plugins alone; the ops defined inside are undefined at the end."""
    global _kit
    before, _kit = _kit, Kit(alone=True)
    try:
        yield _kit
    finally:
        for op in reversed(list(_kit.ops.values())):
            while _kit.ops.get(op.spec.name) is not None:
                _kit.undefine(_kit.ops[op.spec.name])
        _kit = before
