"""Who answers for an op in a mode: author, plugin for this op, plugin for this mode, built-in; in that order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence

from hopkit._torch import keys
from hopkit.errors import PluginError, RuleConflictError
from hopkit.manager import BUILTIN_PLUGINS, Impl, Plugins
from hopkit.modes import Mode
from hopkit.rule import Answer, Place, Table
from hopkit.spec import OpSpec

BODY_MODES = ("device", "fake")
"""Modes whose rules have the body's own signature."""

_PASSED = {"autograd": "(call)", "functionalize": "(layer, call)", "proxy": "(tracer, call)"}
"""What the rules of the other built-in modes are called with."""

Complain = Callable[[Sequence[str], PluginError], None]
"""Told which plugins did what wrong. If it returns, they are passed over."""


def resolve(spec: OpSpec, author: Sequence[Answer], plugins: Plugins, complain: Complain) -> Table:
    """The answers for ``spec``, per mode.

    Args:
        spec: The op.
        author: Rules that its author attached.
        plugins: Who is asked.
        complain: Told of plugins that raise, that give what is no rule, or that claim the same place. What it raises
            is passed on; where it returns, the first are passed over, and a call that two plugins claim raises.
    """
    table: dict[str, tuple[Answer, ...]] = {}
    for mode in plugins.modes:
        if not mode.open:
            continue
        found = [answer for answer in author if answer.mode == mode.name]
        overrides: dict[str, tuple[str, ...]] = {}
        for impl in plugins.impls(f"hopkit_{mode.name}_rule"):
            if not impl.ops or spec.name in impl.ops:
                overrides[impl.plugin] = impl.overrides
                try:
                    found.extend(_answers(spec, mode, impl))
                except PluginError as error:
                    complain([impl.plugin], error)
        table[mode.name] = _ordered(spec, mode, found, overrides, complain)
    return table


def _answers(spec: OpSpec, mode: Mode, impl: Impl) -> list[Answer]:
    place = Place.BUILTIN if impl.plugin in BUILTIN_PLUGINS else Place.OP if impl.ops else Place.MODE
    who = f"plugin '{impl.plugin}', hook '{impl.hook}', op '{spec.name}'"
    answers = []
    for device, rule in _per_device(mode, impl.ask(op=spec)):
        check_rule(who, spec, mode, rule, device)
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
    if mode.name == "autograd" and hasattr(rule, "backward"):
        forward = getattr(rule, "forward", None)
        if not (callable(forward) and callable(rule.backward)):
            raise _wrong(who, "an object without both `forward` and `backward`", wanted)
        _check_signature(who, wanted, forward, lambda: spec.check_signature(forward))
    elif not callable(rule):
        raise _wrong(who, f"{rule!r}, a {type(rule).__qualname__}", wanted)
    elif mode.name in BODY_MODES:
        _check_signature(who, wanted, rule, lambda: spec.check_signature(rule))
    else:
        passed = expected(spec, mode).split(",")
        _check_signature(who, wanted, rule, lambda: inspect.signature(rule).bind(*passed))


def expected(spec: OpSpec, mode: Mode) -> str:
    """The signature of a rule of ``mode`` for ``spec``, as its author would write it."""
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
    spec: OpSpec, mode: Mode, found: Sequence[Answer], overrides: Mapping[str, tuple[str, ...]], complain: Complain
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
                    ordered.append(_refusal(spec, mode, contested))
                if contested and not first:
                    complain([claim.plugin for claim in contested], _conflict(spec, mode, contested))
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


def _refusal(spec: OpSpec, mode: Mode, claims: Sequence[Answer]) -> Answer:
    """What answers in a place that several plugins claim, until one of them goes or overrides the others."""

    def refuse(*_: object, **__: object) -> object:
        raise _conflict(spec, mode, claims)

    return Answer(mode.name, refuse, claims[0].place, ", ".join(claim.plugin for claim in claims), claims[0].device)


def _conflict(spec: OpSpec, mode: Mode, claims: Sequence[Answer]) -> RuleConflictError:
    names = sorted(claim.plugin for claim in claims)
    return RuleConflictError(
        f"op '{spec.name}' in mode '{mode.name}'",
        f"is claimed by plugins {' and '.join(map(repr, names))}",
        why="which of them answers would depend on the order of installation",
        todo=f"Let one say so, `@hookimpl(overrides={names[0]!r})`, or block one, `HOPKIT_BLOCK={names[0]}`",
    )
