"""Rules, and the chain of them that answers for one op in one mode."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from hopkit.errors import RuleError

Rule: TypeAlias = Callable[..., object] | object
"""A function of the signature that its mode asks for, or (autograd) an object with ``forward`` and ``backward``."""


class Decline(Exception):
    """Raised by a rule that does not answer this call; the next in the chain is asked.

    Args:
        reason: Why not; shown if nobody answers.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Place(enum.IntEnum):
    """Whose word counts, first to last."""

    AUTHOR = 0
    OP = 1
    MODE = 2
    BUILTIN = 3


@dataclasses.dataclass(frozen=True)
class Answer:
    """One rule, and whose it is.

    Args:
        mode: The mode it answers in.
        rule: What answers.
        place: Whose word it is.
        plugin: Who supplied it; the op's own module for its author.
        device: A device type it is limited to, or "".
    """

    mode: str
    rule: Rule
    place: Place
    plugin: str
    device: str = ""

    @property
    def where(self) -> str:
        """``file:line`` of the rule."""
        return source(self.rule)


def source(rule: object) -> str:
    """``file:line`` where a function or class was written, or "" where nobody knows."""
    target = inspect.unwrap(rule) if callable(rule) else type(rule)
    code = getattr(target, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    try:
        return f"{inspect.getsourcefile(target)}:{inspect.getsourcelines(target)[1]}"
    except (TypeError, OSError):
        return ""


F = TypeVar("F", bound=Callable[..., object])

_MARK = "hopkit_on_call"


def on_call(rule: F) -> F:
    """Mark a rule that takes ``(level, call)``, whatever the op: the flat call, with captures among its inputs."""
    vars(rule)[_MARK] = True
    return rule


def takes_calls(rule: object) -> bool:
    """Whether a rule was marked with `on_call`."""
    return bool(getattr(rule, _MARK, False))


Table = Mapping[str, tuple[Answer, ...]]
"""For every mode, who answers, first to last."""


def ask(op: str, mode: str, rules: Sequence[Callable[..., object]], /, *args: object, **kwargs: object) -> object:
    """What the first rule that does not decline gives.

    Raises:
        RuleError: All of them declined.
    """
    reasons = []
    for rule in rules:
        try:
            result = rule(*args, **kwargs)
        except Decline as declined:
            reasons.append(declined.reason)
            continue
        if result is NotImplemented:
            raise RuleError(
                f"a rule of op '{op}' in mode '{mode}' ({source(rule)})",
                "gave `NotImplemented`",
                why="it would be taken for the op's result",
                todo='Let it decline, `raise hopkit.extend.Decline("why not")`',
            )
        return result
    raise RuleError(
        f"op '{op}' in mode '{mode}'",
        f"has no rule that answers this call: {'; '.join(reasons)}",
        why="every rule in the chain declined",
        todo=f'Attach one with `@op.rule("{mode}")`, or run the body with `hopkit.decompose(op)`',
    )
