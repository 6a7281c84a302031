"""Who answers for an op in a mode: author, plugin for this op, plugin for this mode, built-in; in that order."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from hopkit._torch import keys
from hopkit.errors import PluginError, RuleConflictError
from hopkit.manager import BUILTIN_PLUGINS, Impl, Plugins
from hopkit.modes import Mode
from hopkit.rule import Answer, Place, Table, takes_calls
from hopkit.spec import OpSpec

BODY_MODES = ("device", "fake")
"""Modes whose rules have the body's own signature."""

_PASSED = {
    "dynamo": "(frame, op)",
    "autograd": "(call)",
    "functionalize": "(layer, call)",
    "proxy": "(tracer, call)",
    "jvp": "(primals, tangents)",
    "inductor": "(call)",
}
"""What the rules of the other built-in modes are called with."""

Complain = Callable[[str, PluginError], None]
"""Told which plugin did what wrong. If it returns, the plugin is passed over."""


@dataclasses.dataclass(frozen=True)
class Contested:
    """What answers in a place that several plugins claim, until one of them goes or overrides the others."""

    op: str
    mode: str
    plugins: tuple[str, ...]

    def __call__(self, *_: object, **__: object) -> object:
        raise self.error()

    def error(self) -> RuleConflictError:
        """What a call is told."""
        names = sorted(self.plugins)
        return RuleConflictError(
            f"op '{self.op}' in mode '{self.mode}'",
            f"is claimed by plugins {' and '.join(map(repr, names))}",
            why="which of them answers would depend on the order of installation",
            todo=f"Let one say so, `@hookimpl(overrides={names[0]!r})`, or block one, `HOPKIT_BLOCK={names[0]}`",
        )


def resolve(spec: OpSpec, author: Sequence[Answer], plugins: Plugins, complain: Complain) -> Table:
    """The answers for ``spec``, per mode.

    Args:
        spec: The op.
        author: Rules that its author attached.
        plugins: Who is asked.
        complain: Told of a plugin that raises, or gives what is no rule. What it raises is passed on.
    """
    table: dict[str, tuple[Answer, ...]] = {}
    for mode in plugins.modes:
        if not mode.open:
            continue
        found = [answer for answer in author if answer.mode == mode.name]
        overrides: dict[str, tuple[str, ...]] = {}
        for impl in plugins.impls(f"hopkit_{mode.name}_rule", spec.name):
            overrides[impl.plugin] = impl.overrides
            try:
                found.extend(_answers(spec, mode, impl))
            except PluginError as error:
                complain(impl.plugin, error)
        table[mode.name] = _ordered(spec, mode, found, overrides)
    return table


def conflicts(table: Table) -> Iterator[Contested]:
    """The places that several plugins claim, and where none of them overrides all others."""
    for answers in table.values():
        for _, here in itertools.groupby(answers, lambda answer: (answer.place, answer.device)):
            first = next(here).rule
            if isinstance(first, Contested):
                yield first


def _answers(spec: OpSpec, mode: Mode, impl: Impl) -> list[Answer]:
    place = Place.BUILTIN if impl.plugin in BUILTIN_PLUGINS else Place.OP if impl.ops else Place.MODE
    answers = []
    for device, rule in _per_device(mode, impl.ask(spec)):
        check_rule(impl.who(spec), spec, mode, rule, device)
        answers.append(Answer(mode.name, rule, place, impl.plugin, device))
    return answers


def _per_device(mode: Mode, given: object) -> Iterable[tuple[str, object]]:
    if mode.name == "device" and isinstance(given, Mapping):
        return given.items()
    return () if given is None else [("", given)]


def check_rule(who: str, spec: OpSpec, mode: Mode, rule: object, device: str = "") -> None:
    """Check that ``rule`` can be called as its mode calls it.

    Raises:
        PluginError: It cannot.
    """
    wanted = f"a function that takes {expected(spec, mode)}"
    if device and (mode.name != "device" or not keys.is_device(device)):
        found = f"a rule for device {device!r} in mode '{mode.name}'"
        raise _wrong(who, found, "a device type that torch knows ('cpu', 'cuda'), in mode 'device' alone")
    if mode.name == "autograd" and (hasattr(rule, "forward") or hasattr(rule, "backward")):
        forward, backward = getattr(rule, "forward", None), getattr(rule, "backward", None)
        wanted = f"`forward{spec.shown()} -> (out, saved)` and `backward(saved, *gradients)`, or {wanted}"
        if not (callable(forward) and callable(backward)):
            there, missing = ("forward", "backward") if callable(forward) else ("backward", "forward")
            raise _wrong(who, f"an object with `{there}` and without `{missing}`", wanted)
        _check_signature(who, wanted, forward, lambda: spec.check_signature(forward))
    elif not callable(rule):
        raise _wrong(who, f"{rule!r}, a {type(rule).__qualname__}", wanted)
    elif mode.in_place:
        _check_signature(who, wanted, rule, lambda: spec.check_signature(functools.partial(rule, None)))
    elif mode.name in BODY_MODES:
        _check_signature(who, wanted, rule, lambda: spec.check_signature(rule))
    elif takes_calls(rule) and mode.name != "autograd":
        _check_signature(who, "a function that takes (level, call)", rule, lambda: inspect.signature(rule).bind(1, 2))
    elif mode.name == "vmap":
        _check_signature(who, wanted, rule, lambda: spec.check_signature(functools.partial(rule, None, None)))
    else:
        passed = expected(spec, mode).split(",")
        _check_signature(who, wanted, rule, lambda: inspect.signature(rule).bind(*passed))


def expected(spec: OpSpec, mode: Mode) -> str:
    """The signature of a rule of ``mode`` for ``spec``, as its author would write it."""
    if mode.name == "vmap":
        return f"(info, in_dims, {spec.shown().removeprefix('(')}"
    if mode.in_place:
        return f"(entry, {spec.shown().removeprefix('(')}"
    return spec.shown() if mode.name in BODY_MODES else _PASSED.get(mode.name, "(entry, call)")


def _check_signature(who: str, wanted: str, rule: Callable[..., object], check: Callable[[], object]) -> None:
    try:
        check()
    except TypeError as error:
        raise _wrong(who, f"a rule that takes {inspect.signature(rule)}", wanted) from error
    except ValueError:  # a builtin that has no signature
        return


def _wrong(who: str, found: str, wanted: str) -> PluginError:
    return PluginError(who, f"gave {found}", why="it could not be called in this mode", todo=f"Give {wanted}")


def _ordered(
    spec: OpSpec, mode: Mode, found: Sequence[Answer], overrides: Mapping[str, tuple[str, ...]]
) -> tuple[Answer, ...]:
    ordered: list[Answer] = []
    for place in Place:
        here = [answer for answer in found if answer.place is place]
        # What is written for one device comes before what is written for all of them.
        for device in sorted({answer.device for answer in here}, reverse=True):
            claims = [answer for answer in here if answer.device == device]
            if place is Place.AUTHOR:
                ordered.extend(reversed(claims))  # the last that was attached counts
            else:
                first, contested = _settled(claims, overrides)
                ordered.extend(first)
                if contested:
                    names = tuple(claim.plugin for claim in contested)
                    rule = Contested(spec.name, mode.name, names)
                    ordered.append(Answer(mode.name, rule, place, ", ".join(names), device))
    return tuple(ordered)


def _settled(claims: Sequence[Answer], overrides: Mapping[str, tuple[str, ...]]) -> tuple[list[Answer], list[Answer]]:
    """The claims in the order that their overrides settle, and those that they leave open."""
    settled, left = [], list(claims)
    while left:
        beaten = {name for claim in left for name in overrides[claim.plugin]}
        free = [claim for claim in left if claim.plugin not in beaten]
        if len(free) != 1:
            break
        settled += free
        left.remove(free[0])
    return settled, left
