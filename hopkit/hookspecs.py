"""The menu: every question hopkit asks a plugin. A plugin is a module or object with some of these functions.

Hooks are asked when an op is defined, when a plugin comes or goes, or by a command; never when an op is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, overload

import pluggy

from hopkit.modes import Mode
from hopkit.rule import Rule
from hopkit.spec import OpSpec, Sample

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from hopkit.op import AnyOp
    from hopkit.testing import Column

PROJECT = "hopkit"
F = TypeVar("F", bound=Callable[..., object])

hookspec = pluggy.HookspecMarker(PROJECT)
_hookimpl = pluggy.HookimplMarker(PROJECT)


@overload
def hookimpl(function: F, /) -> F: ...
@overload
def hookimpl(*, op: str | tuple[str, ...] = (), overrides: str | tuple[str, ...] = ()) -> Callable[[F], F]: ...
def hookimpl(
    function: F | None = None, /, *, op: str | tuple[str, ...] = (), overrides: str | tuple[str, ...] = ()
) -> F | Callable[[F], F]:
    """Mark a function as the answer to the hook of its name.

    Args:
        function: The function, where the marker is used without arguments.
        op: Answer for the ops of these names alone. Such an answer comes before one for any op.
        overrides: The plugins whose answers in the same place this one goes before. Without it two are a conflict.

    Raises:
        TypeError: A name is no string.
    """
    named = {"hopkit_op": _names("op", op), "hopkit_overrides": _names("overrides", overrides)}

    def mark(function: F) -> F:
        vars(function).update(named)
        return _hookimpl(function)

    return mark if function is None else mark(function)


def _names(keyword: str, given: object) -> tuple[str, ...]:
    names = given if isinstance(given, tuple) else (given,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"hookimpl() takes names in {keyword}=, such as 'demo_twice', not {given!r}")
    return names


class Hooks:
    """The hooks of the built-in modes, and those of a plugin's life. A mode that a plugin adds has one more."""

    @hookspec
    def hopkit_dynamo_rule(self, op: OpSpec) -> Rule | None:
        """How a call of ``op`` that Dynamo reads gets into its graph.

        Returns:
            ``rule(frame, op) -> result``, in Dynamo's variables, or None.
        """

    @hookspec
    def hopkit_autograd_rule(self, op: OpSpec) -> Rule | None:
        """How ``op`` is differentiated.

        Returns:
            ``rule(call) -> outputs``, an object with ``forward`` and ``backward``, or None: no answer for this op.
        """

    @hookspec
    def hopkit_vmap_rule(self, op: OpSpec) -> Rule | None:
        """What ``op`` is under ``torch.vmap``.

        Returns:
            ``rule(info, in_dims, *args, **kwargs) -> (out, out_dims)``, a rule ``(batch, call)`` marked with
            `hopkit.extend.vmap.on_call`, or None.
        """

    @hookspec
    def hopkit_jvp_rule(self, op: OpSpec) -> Rule | None:
        """What ``op`` is under ``torch.func.jvp``.

        Returns:
            ``rule(primals, tangents) -> (out, out_tangents)``, a rule ``(level, call)`` marked with
            `hopkit.extend.jvp.on_call`, or None.
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
    def hopkit_inductor_rule(self, op: OpSpec) -> Rule | None:
        """What Inductor makes of a node of ``op``. Without an answer it gets the body instead of a node.

        Returns:
            ``rule(call) -> outputs``, in Inductor's terms, or None.
        """

    @hookspec
    def hopkit_add_modes(self) -> Iterable[Mode]:
        """Modes that the plugin brings.

        Returns:
            The modes. Each gets a hook of its own: ``hopkit_<name>_rule(op) -> rule | None``, where
            ``rule(entry, call) -> outputs``, and the entry is the active mode, the tensor class or the dispatch key.
        """
        return ()

    @hookspec
    def hopkit_add_ops(self) -> Iterable[AnyOp]:
        """Ops that the plugin brings.

        Returns:
            Ops that its module defines when it is imported; the hook makes them known as the plugin's own.
        """
        return ()

    @hookspec
    def hopkit_add_columns(self) -> Iterable[Column]:
        """Columns that the plugin adds to the matrix. Each `hopkit.testing.check` asks for them, and runs them.

        Returns:
            The columns of a `hopkit.testing.Group`.
        """
        return ()

    @hookspec
    def hopkit_op_defined(self, op: OpSpec) -> None:
        """``op`` was defined, and its rules are installed. A plugin that comes later hears of all that are there."""

    @hookspec
    def hopkit_add_commands(self) -> Mapping[str, Callable[[Sequence[str]], int]]:
        """Commands that the plugin brings to ``hopkit`` on the command line.

        Returns:
            By name, functions that take the arguments after the name and give the exit status: 0, 1 where something is
            wrong, 2 where the command makes no sense, as it is also for `HopkitError`, ``ValueError`` and ``OSError``.
            The first line of a function's docstring is its help.
        """
        return {}

    @hookspec
    def hopkit_samples_from_program(self, op: OpSpec, program: ExportedProgram) -> Iterable[Sample] | None:
        """Example calls of ``op`` found in ``program``, a user's own (``hopkit check OP --program FILE``).

        Returns:
            The calls, or None: no answer for this op. Raises `HopkitError` where the program has none.
        """
