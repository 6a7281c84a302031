"""Weights that a fold lets go of: their constants are computed there and then, and whoever touches them is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch.fx import Node

import hopkit
from hopkit_constgraph.constants import Constants, ancestors, graph_of


def final(chosen: Sequence[Node], found: Constants) -> tuple[list[Node], list[Node]]:
    """The constants whose weights nothing else uses, so that they may be computed for good; and these weights."""
    done = set(chosen)
    while True:
        unused: set[Node] = set()
        for node in sorted({*found.sources, *found.computed}, reverse=True):
            # What gives nothing is a check, and goes with what it checks.
            if all(user in done or user in unused for user in node.users):
                unused.add(node)
        weights = {node: [w for w in ancestors([node]) if w in found.sources] for node in done}
        kept = {node for node in done if all(weight in unused for weight in weights[node])}
        if kept == done:
            return sorted(done), sorted({weight for node in done for weight in weights[node]})
        done = kept


def computed(nodes: Sequence[Node], found: Constants) -> dict[Node, torch.Tensor]:
    """The values of constants."""
    if not nodes:
        return {}
    graph, weights = graph_of(nodes, found)
    with torch.no_grad():
        return dict(zip(nodes, graph(*(found.sources[node] for node in weights)), strict=True))


def release(weights: Mapping[str, torch.Tensor]) -> None:
    """Give back the memory of weights, by their names. Whoever uses one of them from now on gets an error."""
    for name, weight in weights.items():
        if not isinstance(weight, _Released):  # of a tied weight, the first name counts
            weight.grad = None
            weight.data = weight.data.new_empty(0)
            weight.__class__ = _ReleasedParameter if isinstance(weight, torch.nn.Parameter) else _ReleasedBuffer
            weight.__dict__["name"] = name


def refuse(names: Iterable[str]) -> NoReturn:
    """Say that weights are gone.

    Raises:
        HopkitError: Always.
    """
    raise hopkit.HopkitError(
        f"weight '{', '.join(names)}'",
        "was released when its model was folded, and can be neither read nor changed",
        why="what is computed from it is kept, and it is not: `Policy(release=True)`",
        todo="Load the model anew, change it, and fold it again; or fold it with `Policy(release=False)`",
    )


class _Released(torch.Tensor):
    """A tensor that refuses all that is done with it, as torch's lazy parameters do (torch/nn/parameter.py)."""

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override] # torch's own has a name less
        return f"<weight '{self.__dict__['name']}', released>"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: object = None
    ) -> object:
        refuse(dict.fromkeys(_names([args, kwargs])))


def _names(value: object) -> Iterator[str]:
    """The names of the released weights in arguments."""
    if isinstance(value, _Released):
        yield value.__dict__["name"]
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _names(item)


class _ReleasedBuffer(_Released):
    pass


class _ReleasedParameter(_Released, torch.nn.Parameter):
    pass
