"""Who answers for an op in a mode: author, plugin for this op, plugin for this mode, built-in; in that order."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

from hopkit._torch import keys
from hopkit.errors import HopkitError, HopkitWarning, PluginError, RuleConflictError
from hopkit.manager import BUILTIN_PLUGINS, Impl, Plugins
from hopkit.modes import Mode
from hopkit.rule import Answer, Place, Table
from hopkit.spec import OpSpec

BODY_MODES = ("device", "fake")
"""Modes whose rules have the body's own signature."""


def resolve(spec: OpSpec, author: Sequence[Answer], plugins: Plugins, *, strict: bool) -> Table:
    """The answers for ``spec``, per mode.

    Args:
        spec: The op.
        author: Rules that its author attached.
        plugins: Who is asked.
        strict: Whether a plugin that raises fails the whole (a plugin is being registered) or is reported and passed
            over (an op is being defined).

    Raises:
        RuleConflictError: Two plugins claim one place.
        PluginError: A plugin raised, or gave what is no rule.
    """
    table: dict[str, tuple[Answer, ...]] = {}
    for mode in plugins.modes:
        if not mode.open:
            continue
        found = [answer for answer in author if answer.mode == mode.name]
        for impl in plugins.impls(f"hopkit_{mode.name}_rule"):
            if impl.op in (None, spec.name):
                found.extend(_answers(spec, mode, impl, strict))
        table[mode.name] = _ordered(spec, mode, found, plugins)
    return table


def _answers(spec: OpSpec, mode: Mode, impl: Impl, strict: bool) -> Iterable[Answer]:
    try:
        given = impl.function(op=spec)
    except Exception as error:  # whatever a plugin raises is its own
        failure = error if isinstance(error, HopkitError) else _raised(spec, impl, error)
        if strict:
            raise failure from error
        warnings.warn(str(failure), HopkitWarning, stacklevel=2)
        return
    place = Place.BUILTIN if impl.plugin in BUILTIN_PLUGINS else Place.MODE if impl.op is None else Place.OP
    for device, rule in _per_device(mode, given):
        check_rule(f"plugin '{impl.plugin}', hook '{impl.hook}', op '{spec.name}'", spec, mode, rule, device)
        yield Answer(mode.name, rule, place, impl.plugin, device)


def _raised(spec: OpSpec, impl: Impl, error: Exception) -> PluginError:
    return PluginError(
        f"plugin '{impl.plugin}', hook '{impl.hook}'",
        f"raised {type(error).__name__}: {error} (asked for op '{spec.name}')",
        why="hopkit cannot tell what the plugin answers",
        todo="Return None for ops that the plugin does not know",
    )


def _per_device(mode: Mode, given: object) -> Iterable[tuple[str, object]]:
    if mode.name == "device" and isinstance(given, Mapping):
        return given.items()
    return () if given is None else [("", given)]


def check_rule(who: str, spec: OpSpec, mode: Mode, rule: object, device: str = "") -> None:
    """Check that ``rule`` can be called as its mode calls it.

    Raises:
        PluginError: It cannot.
    """
    wanted = expected(spec, mode)
    if mode.name == "autograd" and hasattr(rule, "backward"):
        if callable(rule.backward) and callable(getattr(rule, "forward", None)):
            _check_signature(who, f"{spec.signature()}", rule.forward, lambda s: _takes_body(spec, s))
            return
        raise _wrong(who, "an object without both `forward` and `backward`", wanted)
    if not callable(rule):
        raise _wrong(who, f"{rule!r}, a {type(rule).__qualname__}", wanted)
    if mode.name in BODY_MODES:
        _check_signature(who, wanted, rule, lambda s: _takes_body(spec, s))
    else:
        count = wanted.count(",") + 1
        _check_signature(who, wanted, rule, lambda s: s.bind(*range(count)))
    if device:
        try:
            keys.of_device(device)
        except RuntimeError as error:
            raise _wrong(
                who, f"a rule for device {device!r}, which torch does not know", '"cpu", "cuda" ...'
            ) from error


def expected(spec: OpSpec, mode: Mode) -> str:
    """The signature of a rule of ``mode`` for ``spec``, as its author would write it."""
    calls = {"autograd": "(call)", "functionalize": "(layer, call)", "proxy": "(tracer, call)"}
    return spec.shown() if mode.name in BODY_MODES else calls.get(mode.name, "(entry, call)")


def _check_signature(
    who: str, wanted: str, rule: Callable[..., object], fits: Callable[[inspect.Signature], object]
) -> None:
    try:
        signature = inspect.signature(rule)
    except (TypeError, ValueError):  # a builtin that has none
        return
    try:
        fits(signature)
    except TypeError as error:
        raise _wrong(who, f"a rule that takes {signature}", wanted) from error


def _takes_body(spec: OpSpec, signature: inspect.Signature) -> None:
    args, kwargs = spec.arguments({p.name: () if p.variadic else None for p in spec.parameters})
    bound = signature.bind(*args, **kwargs)
    names = [p.name for p in spec.parameters if p.passing is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    taken = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if taken[: len(names)] != names[: len(taken)]:
        raise TypeError(f"{taken} are not {names}: {bound}")


def _wrong(who: str, found: str, wanted: str) -> PluginError:
    return PluginError(
        who, f"gave {found}", why="it could not be called in this mode", todo=f"Give a function that takes {wanted}"
    )


def _ordered(spec: OpSpec, mode: Mode, found: Sequence[Answer], plugins: Plugins) -> tuple[Answer, ...]:
    overrides = {i.plugin: i.overrides for i in plugins.impls(f"hopkit_{mode.name}_rule") if i.overrides}
    ordered: list[Answer] = []
    for place in Place:
        here = [answer for answer in found if answer.place is place]
        for device in dict.fromkeys(answer.device for answer in here):
            ordered.extend(_settled(spec, mode, [a for a in here if a.device == device], overrides))
    # What is written for one device comes before what is written for all of them, in the same place.
    return tuple(sorted(ordered, key=lambda answer: (answer.place, not answer.device)))


def _settled(spec: OpSpec, mode: Mode, claims: list[Answer], overrides: Mapping[str, str | None]) -> Sequence[Answer]:
    if len(claims) < 2 or claims[0].place in (Place.AUTHOR, Place.BUILTIN):
        return claims[::-1] if claims and claims[0].place is Place.AUTHOR else claims
    for first in claims:
        rest = [claim for claim in claims if claim is not first]
        if len(rest) == 1 and overrides.get(first.plugin) == rest[0].plugin:
            return (first, *rest)
        if len(rest) > 1 and overrides.get(first.plugin) in {claim.plugin for claim in rest}:
            return (first, *_settled(spec, mode, rest, overrides))
    names = " and ".join(f"'{claim.plugin}'" for claim in claims)
    raise RuleConflictError(
        f"op '{spec.name}' in mode '{mode.name}'",
        f"is claimed by plugins {names}",
        why="which of them answers would depend on the order of installation",
        todo=f"Let one say so: `@hookimpl(overrides={cast('Answer', claims[-1]).plugin!r})`",
    )
