"""The menu: every question hopkit asks a plugin. A plugin is a module or object with some of these functions.

Hooks are asked when an op is defined and when a plugin comes or goes, never when an op is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast, overload

import pluggy

from hopkit.modes import Mode
from hopkit.rule import Rule
from hopkit.spec import OpSpec

if TYPE_CHECKING:
    from hopkit.op import AnyOp

PROJECT = "hopkit"
F = TypeVar("F", bound=Callable[..., object])

hookspec = pluggy.HookspecMarker(PROJECT)
_hookimpl = pluggy.HookimplMarker(PROJECT)


@overload
def hookimpl(function: F, /) -> F: ...
@overload
def hookimpl(*, op: str | None = None, overrides: str | None = None) -> Callable[[F], F]: ...
def hookimpl(
    function: F | None = None, /, *, op: str | None = None, overrides: str | None = None
) -> F | Callable[[F], F]:
    """Mark a function as the answer to the hook of its name.

    Args:
        function: The function, where the marker is used without arguments.
        op: Answer for the op of this name alone. Such an answer comes before one for any op.
        overrides: The plugin whose answer in the same place this one goes before. Without it two are a conflict.
    """

    def mark(function: F) -> F:
        vars(function).update(hopkit_op=op, hopkit_overrides=overrides)
        return cast("F", _hookimpl(function))

    return mark if function is None else mark(function)


class Hooks:
    """The hooks of the built-in modes, and those of a plugin's life. A mode that a plugin adds has one more."""

    @hookspec
    def hopkit_autograd_rule(self, op: OpSpec) -> Rule | None:
        """How ``op`` is differentiated.

        Returns:
            ``rule(call) -> outputs``, an object with ``forward`` and ``backward``, or None: no answer for this op.
        """

    @hookspec
    def hopkit_functionalize_rule(self, op: OpSpec) -> Rule | None:
        """What ``op`` is without mutation.

        Returns:
            ``rule(layer, call) -> outputs``, or None.
        """

    @hookspec
    def hopkit_proxy_rule(self, op: OpSpec) -> Rule | None:
        """How a call of ``op`` is written into a graph.

        Returns:
            ``rule(tracer, call) -> outputs``, or None.
        """

    @hookspec
    def hopkit_fake_rule(self, op: OpSpec) -> Rule | None:
        """What ``op`` gives on fake tensors.

        Returns:
            A function with the body's signature, or None.
        """

    @hookspec
    def hopkit_device_rule(self, op: OpSpec) -> Rule | Mapping[str, Rule] | None:
        """What computes ``op``.

        Returns:
            A function with the body's signature, a mapping from device types ("cuda") to such functions, or None.
        """

    @hookspec
    def hopkit_add_modes(self) -> Iterable[Mode]:
        """Modes that the plugin brings: each gets a hook ``hopkit_<name>_rule`` of its own."""
        return ()

    @hookspec
    def hopkit_add_ops(self) -> Iterable[AnyOp]:
        """Ops that the plugin brings. They are defined when its module is imported; this makes them known as its own."""
        return ()

    @hookspec
    def hopkit_op_defined(self, op: OpSpec) -> None:
        """``op`` was defined, and its rules are installed."""
