"""Symbolic sizes. ``SymInt`` prints as its sympy expression (2.13, 2.14); if it no longer does, every symbolic size is
one that `hopkit.codec.evaluate` cannot read, and recorded subgraphs accept any size there.

``torch.fx.experimental.symbolic_shapes`` is imported inside the functions that need it: it loads sympy, which adds a
fifth to ``import torch``, and by the time there is a symbol torch has loaded it.
"""

from __future__ import annotations

import enum
import re
import weakref
from collections.abc import Callable, Iterable, Set
from types import MethodType
from typing import TYPE_CHECKING, cast

import torch
from torch._functorch import predispatch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

Describe = Callable[[int], int | str]


def number(value: object) -> str:
    """The type of a number, symbolic or not, or ""."""
    kinds: dict[str, tuple[type, ...]] = {
        "bool": (bool, torch.SymBool),
        "int": (int, torch.SymInt),
        "float": (float, torch.SymFloat),
    }
    return next((name for name, kind in kinds.items() if isinstance(value, kind)), "")


def describe(size: int) -> int | str:
    """A size as a number, or as the expression that it stands for."""
    if not isinstance(size, SYMBOLIC):
        return int(size)
    expression = str(size)
    return int(expression) if expression.isdigit() else expression


def now(size: int) -> int | str:
    """As `describe`, with what symbols stand for where that is known."""
    known = getattr(getattr(size, "node", None), "hint", None)
    return describe(size) if known is None else cast("int", known)


class Equal(enum.Enum):
    """How sure it must be that two sizes are equal; the most sure comes first."""

    ALWAYS = "for all inputs"
    NOW = "for these inputs: a graph recorded from them has a guard that says so"
    PERHAPS = "for all that anybody knows before the op has run"

    def holds(self, expected: int | None, size: int) -> bool:
        """Whether it is so for these two. Nothing (None) is expected of a size that only running the op tells."""
        if expected is None:
            return self is Equal.PERHAPS or unbacked(size)
        if not any(isinstance(n, SYMBOLIC) for n in (expected, size)):
            return expected == size
        from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true, statically_known_true

        test = {Equal.ALWAYS: statically_known_true, Equal.NOW: guard_or_false, Equal.PERHAPS: guard_or_true}[self]
        with disable_proxy_modes_tracing():  # the question is no part of what is recorded
            return test(expected == size)


def numbers(values: Iterable[object]) -> list[object]:
    """The symbolic numbers among ``values`` and among the sizes of tensors."""
    every = (n for v in values for n in (v.shape if isinstance(v, torch.Tensor) else (v,)))
    return [n for n in every if isinstance(n, SYMBOLIC)]


def symbols(values: Iterable[object]) -> set[object]:
    """The symbols in the sizes of tensors, and in symbolic numbers."""
    found = numbers(values)
    if not found:
        return set()
    from torch.fx.experimental.symbolic_shapes import free_symbols

    return {symbol for number in found for symbol in free_symbols(number)}


class Names:
    """Sizes in words that are equal for equal calls: symbols that came up on the way are named by their order.

    Args:
        made: Those symbols; more may be added later.
    """

    def __init__(self, made: Set[object]) -> None:
        self._made = made
        self._names: dict[str, str] = {}

    def __call__(self, size: int) -> int | str:
        """As `describe`, with a name of its own for every symbol that was made."""
        made = {str(symbol) for symbol in symbols([size]) & self._made}

        def name(match: re.Match[str]) -> str:
            symbol = match[0]
            return self._names.setdefault(symbol, f"n{len(self._names)}") if symbol in made else symbol

        return re.sub(r"[A-Za-z_]\w*", name, str(size)) if made else describe(size)


def unbacked(value: object) -> bool:
    """Whether this is a symbolic number that nobody knows before the op has run."""
    if not isinstance(value, SYMBOLIC):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(value))


_READS = {
    torch.ops.aten.sym_size.int: "size",
    torch.ops.aten.sym_stride.int: "stride",
    torch.ops.aten.sym_numel.default: "numel",
    torch.ops.aten.sym_storage_offset.default: "storage_offset",
}

_OF_LEVEL = {predispatch._add_batch_dim: 2, predispatch._remove_batch_dim: 1, predispatch._unwrap_for_grad: 1}
"""Above autograd a tracer writes these down, with a level as this argument (functorch.predispatch, 2.13, 2.14)."""

_readable: weakref.WeakKeyDictionary[GraphModule, tuple[str, Callable[..., object]]] = weakref.WeakKeyDictionary()


def readable(graph: Callable[..., object]) -> Callable[..., object]:
    """What ``graph`` does, on batched tensors too.

    vmap knows no operator that reads a size (2.13, 2.14). And an item may lie in memory otherwise than it did while it
    was traced, where a view was right; where nothing is written to, a copy is, too. A batch that begins in it is of the
    level that begins there: torch writes down a number, of when nothing was around it.

    It is no call of a module: counters that follow modules know none for a subgraph in eager.
    """
    if not isinstance(graph, GraphModule):
        return graph
    if graph not in _readable or _readable[graph][0] is not graph.code:
        code = torch.fx.Graph()
        code.output(code.graph_copy(graph.graph, {}))
        writes = any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in code.nodes)
        levels: list[torch.fx.Node] = []
        for node in code.nodes:
            if node.target in (predispatch._vmap_increment_nesting, predispatch._jvp_increment_nesting):
                levels.append(node)
            elif node.target in (predispatch._vmap_decrement_nesting, predispatch._jvp_decrement_nesting):
                levels.pop()
            elif node.target in _OF_LEVEL and levels:
                node.update_arg(_OF_LEVEL[node.target], levels[-1])
            elif node.target in _READS:
                node.op, node.target = "call_method", _READS[node.target]
            elif node.target is torch.ops.aten.view.default and not writes:
                node.target = torch.ops.aten.reshape.default
        _readable[graph] = graph.code, type(GraphModule(graph, code)).forward
    return MethodType(_readable[graph][1], graph)


def new_environment() -> ShapeEnv:
    """Where symbols of its own live, for stand-ins of real tensors."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


def unknown(environment: ShapeEnv, kind: str) -> int:
    """A number of this type that nobody knows."""
    makers = {"float": environment.create_unbacked_symfloat, "bool": environment.create_unbacked_symbool}
    return cast("int", makers.get(kind, environment.create_unbacked_symint)())


def another(value: object) -> int:
    """A number of the same type that nobody knows, for a symbolic one."""
    return unknown(cast("torch.SymInt", value).node.shape_env, number(value))


_ASKING = "get value out of a tracing tensor"  # torch/fx/experimental/proxy_tensor.py: proxy_call (2.13, 2.14)


def data_dependent(error: Exception) -> bool:
    """Whether torch raised this because code on stand-ins, or on what a tracer follows, asked for a value."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    of_stand_ins = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
    return isinstance(error, of_stand_ins) or (type(error) is RuntimeError and _ASKING in str(error))
