"""The host: the ops and the plugins of one process, and the tables that connect them."""

from __future__ import annotations

import contextlib
import keyword
import warnings
from collections.abc import Iterable, Iterator
from typing import cast

from hopkit._torch.fakes import outside_modes
from hopkit._torch.operator import taken
from hopkit.errors import DuplicateOpError, HopkitError, HopkitWarning, PluginError, SpecError
from hopkit.manager import PluginInfo, Plugins
from hopkit.op import AnyOp, Op
from hopkit.resolve import check_rule, resolve
from hopkit.rule import Answer, Place, Rule, Table
from hopkit.spec import OpSpec


class Kit:
    """A host. The process has one; tests make their own (`hopkit.testing.fresh`)."""

    def __init__(self, *, installed: bool = True) -> None:
        self.ops: dict[str, AnyOp] = {}
        self._plugins: Plugins | None = None
        self._installed = installed

    # Built when first needed: importing hopkit must stay light.
    @property
    def plugins(self) -> Plugins:
        """The plugins, as far as they are loaded."""
        if self._plugins is None:
            self._plugins = Plugins()
        return self._plugins

    def load(self) -> None:
        """Load the installed plugins, once, and let all ops follow."""
        if self._installed:
            self._installed = False
            with outside_modes():
                self.plugins.load_installed()
                self._follow(strict=False)
        for op in self.ops.values():
            op.loaded()

    def supplied(self) -> dict[str, str]:
        """The ops that plugins bring (``hopkit_add_ops``): torch's name, and the plugin's.

        Raises:
            PluginError: A plugin gives what is no op of this host.
        """
        found: dict[str, str] = {}
        for impl in self.plugins.impls("hopkit_add_ops"):
            for op in cast("Iterable[object]", impl.function()):
                if not isinstance(op, Op) or self.ops.get(op.spec.name) is not op:
                    raise PluginError(
                        f"plugin '{impl.plugin}', hook 'hopkit_add_ops'",
                        f"gave {op!r}",
                        why="it is no op that is defined",
                        todo="Give the ops that `hopkit.define` made",
                    )
                found[op.spec.name] = impl.plugin
        return found

    # -- ops ---------------------------------------------------------------------------------------------------------

    def define(self, spec: OpSpec, *, replace: bool) -> AnyOp:
        """Make the live op of a spec.

        Raises:
            SpecError: The name is no identifier.
            DuplicateOpError: The name is taken.
        """
        self._check_name(spec.name, replace)
        table = resolve(spec, (), self.plugins, strict=False)
        before = self.ops.get(spec.name)
        op: AnyOp = Op(spec, self.load if self._installed else None, self.attach)
        op.install(table, self.plugins.modes)
        op.before = before
        op.place.fill(op.operator)
        self.ops[spec.name] = op
        self._announce(op)
        return op

    def _check_name(self, name: str, replace: bool) -> None:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise SpecError(
                f"op {name!r}",
                "has a name that is no identifier",
                why="torch knows the op as torch.ops.higher_order.<name>",
                todo="Use letters, digits and underscores, and prefix the name with your package",
            )
        if taken(name) and not replace:
            whose = "an op of hopkit" if name in self.ops else "an op of torch"
            raise DuplicateOpError(
                f"op '{name}'",
                f"cannot be defined: {whose} has this name",
                why="torch would drop the other without a word",
                todo="Prefix the name with your package, or say `replace=True`",
            )

    def _announce(self, op: AnyOp) -> None:
        for impl in self.plugins.impls("hopkit_op_defined"):
            try:
                impl.function(op=op.spec)
            except Exception as error:  # the op is defined, whatever a listener thinks of it
                warnings.warn(
                    f"plugin '{impl.plugin}', hook 'hopkit_op_defined' raised {type(error).__name__}: {error}",
                    HopkitWarning,
                    stacklevel=2,
                )

    def undefine(self, op: AnyOp) -> None:
        """Take an op away; what it replaced is back.

        Raises:
            SpecError: It is not defined here, or was replaced since.
        """
        if self.ops.get(op.spec.name) is not op:
            raise SpecError(
                f"op '{op.spec.name}'",
                "is not defined, or another op took its name since",
                why="undefining it would take away somebody else's op",
                todo="Undefine the newer op first",
            )
        del self.ops[op.spec.name]
        if op.before is not None:
            self.ops[op.spec.name] = op.before
        op.place.fill()

    def attach(self, op: AnyOp, mode: str, rule: Rule, device: str) -> None:
        """Attach an author's rule.

        Raises:
            PluginError: There is no such mode, it takes no rules, or the rule does not fit it.
        """
        known = {m.name: m for m in self.plugins.modes}
        if mode not in known or not known[mode].open:
            raise PluginError(
                f"op '{op.spec.name}'",
                f"cannot have a rule in mode '{mode}'" + (", in which its body runs" if mode in known else ""),
                why="nothing would ever ask it",
                todo=f"Modes that take rules are {', '.join(n for n, m in known.items() if m.open)}",
            )
        check_rule(f"op '{op.spec.name}', rule for '{mode}'", op.spec, known[mode], rule, device)
        author = [*op.author, Answer(mode, rule, Place.AUTHOR, cast("str", op.spec.body.__module__), device)]
        table = resolve(op.spec, author, self.plugins, strict=False)
        op.author[:] = author
        op.install(table, self.plugins.modes)

    # -- plugins -----------------------------------------------------------------------------------------------------

    def register(self, plugin: object, name: str | None) -> str:
        """Register a plugin; every op follows. All or nothing.

        Raises:
            PluginError: See `Plugins.register`.
            RuleConflictError: It claims a place that another plugin has.
        """
        self.load()
        chosen = self.plugins.register(plugin, name)
        try:
            self._follow(strict=True)
        except HopkitError:
            self.plugins.unregister(chosen)
            raise
        return chosen

    def unregister(self, plugin: object) -> None:
        """Take a plugin away; every op follows."""
        self.plugins.unregister(self.plugins.name_of(plugin))
        self._follow(strict=False)

    def _follow(self, *, strict: bool) -> None:
        tables: list[tuple[AnyOp, Table]] = [
            (op, resolve(op.spec, op.author, self.plugins, strict=strict)) for op in self.ops.values()
        ]
        for op, table in tables:
            op.install(table, self.plugins.modes)

    def infos(self) -> tuple[PluginInfo, ...]:
        """Every plugin."""
        self.load()
        return self.plugins.infos()


_kit = Kit()


def current() -> Kit:
    """The host of this process."""
    return _kit


@contextlib.contextmanager
def fresh() -> Iterator[Kit]:
    """A host of its own, with the built-in plugins alone; the ops defined inside are undefined at the end."""
    global _kit
    before, _kit = _kit, Kit(installed=False)
    try:
        yield _kit
    finally:
        for op in reversed(list(_kit.ops.values())):
            while _kit.ops.get(op.spec.name) is not None:
                _kit.undefine(_kit.ops[op.spec.name])
        _kit = before
