"""Where Dynamo looked something up, and what it guards there, at another place (torch/_guards.py, 2.13 and 2.14)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import UnspecializedNNModuleSource
from torch._guards import Guard, Source

from hopkit._torch.likeness import CONSTANTS, UnlikeError

BY_VALUE = frozenset(
    {
        *("TYPE_MATCH", "TENSOR_MATCH", "CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "HASATTR"),
        *("DICT_CONTAINS", "DICT_NOT_CONTAINS", "DICT_KEYS_MATCH", "SEQUENCE_LENGTH", "NOT_PRESENT_IN_GENERIC_DICT"),
        "EMPTY_NN_MODULE_HOOKS_DICT",
    }
)
"""Guards that say nothing of which object it is."""


def plain(source: Source) -> Source:
    """A source without what is said of modules: attributes are looked up with it, and without."""
    return plain(source.base) if isinstance(source, UnspecializedNNModuleSource) else source


def parts(source: Source) -> Iterator[tuple[str, Source]]:
    """The sources that a source is made of, by field."""
    for name in getattr(source, "__dataclass_fields__", ()):
        part = getattr(source, name)
        if isinstance(part, Source):
            yield name, part


def moved(guard: Guard, source: Source) -> Guard | None:
    """The guard at another place. None: of a tensor, which has its guard from where it is looked up."""
    fn: Callable[..., object] = guard.create_fn
    if source == guard.originating_source:
        return guard
    if isinstance(fn, functools.partial):
        if fn.func is GuardBuilder.TENSOR_MATCH:
            return None
        if fn.args or any(type(value) not in CONSTANTS for value in fn.keywords.values()):
            raise UnlikeError
    new = source.make_guard(fn)
    new.stack, new.user_stack = guard.stack, guard.user_stack
    return new
