"""What a column of the matrix is, and what it gets: one op on one sample.

A column gets the callable that it runs, since it runs twice where the op fails: if the body itself cannot be run in
this mode, in plain PyTorch, there is nothing that the op could be compared with.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch

from hopkit import binding
from hopkit._torch import trees
from hopkit.op import AnyOp
from hopkit.record import subgraphs
from hopkit.spec import Kind, Sample
from hopkit.testing.compare import Pair
from hopkit.testing.tensors import Tensors, differentiable, grown, negated, smaller

Callee = Callable[..., object]
Run = Callable[..., object]
"""A function of the sample's tensors."""


class NotApplicable(Exception):
    """The column says nothing about this sample; the message says why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a column found: what to compare, the result first, and a remark."""

    pairs: Sequence[Pair]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its name, the group of columns that it belongs to, and what it does."""

    name: str
    group: str
    run: Callable[[Case, Callee], Outcome]


class Group:
    """Columns that belong together, in their order.

    Args:
        name: What chooses all of them.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.columns: list[Column] = []

    def column(self, run: Callable[[Case, Callee], Outcome]) -> Callable[[Case, Callee], Outcome]:
        """Add a column, which has the function's name."""
        self.columns.append(Column(run.__name__, self.name, run))
        return run


class Case:
    """One op on one sample, whose tensors are cloned for every run.

    Args:
        op: The op.
        sample: The call. A subgraph in it must not write to what it closes over.
    """

    def __init__(self, op: AnyOp, sample: Sample) -> None:
        self.op = op
        self.body: Callee = op.spec.body
        self._leaves, self._tree = trees.flatten((tuple(sample.args), dict(sample.kwargs)))
        found = {id(leaf): leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)}
        self._position = {key: i for i, key in enumerate(found)}
        self.tensors: Tensors = list(found.values())

    @property
    def derives(self) -> bool:
        """Whether the op has derivatives."""
        return self.op.spec.autograd == "derive"

    @functools.cached_property
    def declared(self) -> Callee:
        """The body; or else what is declared of it, where ``inputs=`` or ``outputs=`` answers in its place."""
        spec = self.op.spec
        values = binding.bind(spec, *self.arguments(self.tensors))
        kinds = spec.of_kind(Kind.SUBGRAPH, Kind.SUBGRAPHS)
        called = [function for p in kinds for _, function in subgraphs(p.name, values[p.name])]
        inputs, result = spec.inputs, self.body if spec.outputs is None else spec.outputs

        def run(*args: object, **kwargs: object) -> object:
            if inputs is not None:
                examples = cast("Sequence[Sequence[object]]", inputs(*args, **kwargs))
                for function, example in zip(called, examples, strict=True):
                    function(*example)
            return result(*args, **kwargs)

        return run

    def arguments(self, tensors: Tensors) -> tuple[tuple[object, ...], dict[str, object]]:
        """The sample's ``(args, kwargs)``, with these tensors in it."""
        filled = [tensors[self._position[id(leaf)]] if id(leaf) in self._position else leaf for leaf in self._leaves]
        return cast("tuple[tuple[object, ...], dict[str, object]]", trees.unflatten(filled, self._tree))

    def on(self, callee: Callee) -> Run:
        """``callee`` as a function of the sample's tensors."""

        def run(*tensors: torch.Tensor) -> object:
            args, kwargs = self.arguments(tensors)
            return callee(*args, **kwargs)

        return run

    def clones(self, tensors: Tensors | None = None) -> list[torch.Tensor]:
        """The sample's tensors (or these), as new leaves."""
        source = self.tensors if tensors is None else tensors
        return [t.detach().clone().requires_grad_(t.requires_grad and self.derives) for t in source]

    def leaves(self, tensors: Tensors | None = None) -> list[torch.Tensor]:
        """As `clones`, to differentiate by: what the sample wants gradients of, or else whatever can have one."""
        source = self.tensors if tensors is None else tensors
        wanted = [t.requires_grad for t in self.tensors]
        wanted = wanted if any(wanted) else [differentiable(t) for t in self.tensors]
        return [t.detach().clone().requires_grad_(want) for t, want in zip(source, wanted, strict=True)]

    @functools.cached_property
    def others(self) -> list[list[torch.Tensor]]:
        """Other inputs of the same shapes, as far as the body takes them."""
        changed = [[change(t) for t in self.clones()] for change in (smaller, negated)]
        return [tensors for tensors in changed if self._accepts(tensors)]

    @functools.cached_property
    def resized(self) -> list[torch.Tensor] | None:
        """Inputs of another leading size: wherever that size occurs, one more. None where the body does not take it."""
        shapes = [t.shape for t in self.tensors if t.dim()]
        if not shapes or shapes[0][0] < 2:
            return None
        tensors = [grown(t, shapes[0][0]) for t in self.clones()]
        return tensors if self._accepts(tensors) else None

    def _accepts(self, tensors: Tensors) -> bool:
        try:
            self.on(self.body)(*self.clones(tensors))
        except Exception:  # whatever the body raises, it does not take them
            return False
        return True
