"""Subgraphs for a kernel in plain eager: called as they stand. Recording a call takes a thousand times longer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from hopkit.record import Recorder, Recording, subgraphs
from hopkit.spec import Kind, OpSpec


class Live:
    """The author's callable, as a subgraph of a call that nothing differentiates or records."""

    def __init__(self, function: Callable[..., object], captures: Callable[[], tuple[object, ...]]) -> None:
        self._function, self._captures = function, captures

    @property
    def captures(self) -> tuple[object, ...]:
        """The values that the subgraph closes over, each once. Asking for them rehearses the call."""
        return self._captures()

    def __call__(self, /, *args: object, **kwargs: object) -> object:
        return self._function(*args, **kwargs)


def values(spec: OpSpec, given: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a call by parameter, with `Live` subgraphs."""

    @functools.cache
    def recording() -> Recording:
        return Recorder(spec, given).record()

    found = dict(given)
    for p in spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS):
        functions = [function for _, function in subgraphs(p.name, given[p.name])]
        live = tuple(Live(f, functools.partial(_captured, recording, p.name, i)) for i, f in enumerate(functions))
        found[p.name] = live if p.kind is Kind.SUBGRAPHS else live[0]
    return found


def _captured(recording: Callable[[], Recording], name: str, index: int) -> tuple[object, ...]:
    variants = recording().layout.subgraphs[name][index]
    return tuple(recording().inputs[i] for i in dict.fromkeys(i for v in variants for i in v.captures))
