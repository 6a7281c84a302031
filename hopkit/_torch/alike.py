"""Whether Dynamo would read a subgraph as it has read another: then it need not read it again.

What Dynamo reads depends on the code, on what the code reaches, and on the state around the call. Two calls are alike
if the code is the same object, if nothing was written to so far, if the state is the same, and if what both close over
is equal piece by piece, with the same sharing: types, constants, modules' attributes and hooks, what tensors say of
themselves. Whatever Dynamo looked up on the way, inside or outside, must have its counterpart. In doubt they are not.

Private to torch (torch/_dynamo/output_graph.py, side_effects.py, torch/_guards.py, seen in 2.13 and 2.14). Only
`hopkit._torch.frame` imports this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo.exc import Unsupported
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import UnspecializedNNModuleSource
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import unpack_iterable
from torch._dynamo.variables import (
    ConstantVariable,
    NestedUserFunctionVariable,
    TensorVariable,
    UnspecializedNNModuleVariable,
)
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationExisting, VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.nn_module import UnspecializedBuiltinNNModuleVariable
from torch._guards import Guard, Source, TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Proxy

from hopkit._torch import sizes

R = TypeVar("R")


@contextlib.contextmanager
def looked_up(tx: InstructionTranslatorBase) -> Iterator[set[Source]]:
    """Notes where Dynamo looks; `traced_sources` of a tracer do not tell of what it had looked up before."""
    sources = set[Source]()

    class Cache(dict[Source, VariableTracker]):
        def get(self, key: Source, default: object = None) -> object:  # type: ignore[override]
            sources.add(key)
            return super().get(key, default)

    before = tx.output.variable_tracker_cache
    tx.output.variable_tracker_cache = cache = Cache(before)
    try:
        yield sources
    finally:
        before.update(cache)
        tx.output.variable_tracker_cache = before


class UnlikeError(Exception):
    """Two calls are not alike, or nobody can tell."""


class Call(Generic[R]):
    """A call of a subgraph, to be compared with those before it.

    Args:
        tx: Dynamo's own.
        subgraph: What is called.
        arguments: What it is called with: tensors, symbols and constants.

    Raises:
        UnlikeError: It cannot be compared.
    """

    def __init__(self, tx: InstructionTranslatorBase, subgraph: VariableTracker, arguments: Iterable[object]) -> None:
        if (
            not tx.output.is_root_tracer()
            or tx.output.export
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            raise UnlikeError
        self._tx, self._around = tx, _Around.of(tx)
        self._scope = {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}
        self._resolving: dict[Source, object] = {}
        self._leaves: list[VariableTracker] = []
        self._key = (self._walk(subgraph), *map(_told, arguments))
        self._sources = [_plain(leaf.source) if leaf.source else None for leaf in self._leaves]
        self._values = [self._value(leaf, source) for leaf, source in zip(self._leaves, self._sources, strict=True)]

    def found(self) -> tuple[R, list[Proxy]] | None:
        """What was read for a call like this one, and what takes the place of what it captured."""
        for known in self._known()[-_MANY:]:
            try:
                return cast("R", known.result), self._counterparts(known)
            except UnlikeError:
                continue
        return None

    def keep(self, result: R, graph: Graph, captured: Sequence[Proxy], looked_up: Iterable[Source]) -> None:
        """Remember what was read for this call.

        Args:
            result: What to give for a call like it.
            graph: What Dynamo read.
            captured: What it uses from outside.
            looked_up: Where Dynamo looked.
        """
        output, roots = self._tx.output, {source for source in self._sources if source}
        try:
            self._around.check(self._tx)
            if any(node.op == "get_attr" or "unbacked_bindings" in node.meta for node in graph.nodes):
                return  # what belongs to one graph alone
            symbolic = self._tx.output.shape_env.var_to_sources.values()
            if any(_under(source, roots) for known in symbolic for source in known):
                return  # a number that may change later is an input by its place, and has no guard of its value
            origins = [(self._origin(proxy), proxy.node.meta["example_value"]) for proxy in captured]
            sources = {*looked_up, *(origin for origin, _ in origins if isinstance(origin, Source))}
            values = [(source if _under(source, roots) else None, self._resolved(source)) for source in sources]
        except UnlikeError:
            return
        guards = [g for g in output.guards if _under(g.originating_source, roots) or g.originating_source in sources]
        ordered = [source for source in output.guard_on_key_order if _under(source, roots) or source in sources]
        self._known().append(_Known(result, cast("Call[object]", self), origins, values, guards, ordered))

    def _known(self) -> list[_Known]:
        known = _all.setdefault(self._tx.output.tracing_context, {})
        return known.setdefault(self._key, [])

    def _walk(self, variable: VariableTracker) -> object:
        """What a variable is made of, but for modules and tensors, which are noted."""
        variable = variable.realize()
        if type(variable) is NestedUserFunctionVariable:
            if (
                variable.kwdefaults
                or variable.wrapped_fn
                or variable in self._tx.output.side_effects.store_attr_mutations
            ):
                raise UnlikeError
            cells = unpack_iterable(self._tx, variable.closure) if variable.closure else []
            try:
                closed = [self._tx.output.side_effects.load_cell(cell) for cell in cells]
            except Unsupported as error:  # not set yet
                raise UnlikeError from error
            defaults = unpack_iterable(self._tx, variable.defaults) if variable.defaults else []
            return variable.get_code(), id(variable.f_globals), *map(self._walk, closed), *map(self._walk, defaults)
        if type(variable) is ConstantVariable:
            return _told(variable.value)
        if type(variable) not in _LEAVES:
            raise UnlikeError
        if variable not in self._leaves:
            self._leaves.append(variable)
        return type(variable), self._leaves.index(variable), variable.source is None

    def _value(self, leaf: VariableTracker, source: Source | None) -> object:
        if source is None and isinstance(leaf, TensorVariable):
            return leaf.as_proxy().node.meta["example_value"]
        if source is None:
            raise UnlikeError
        return self._resolved(source)

    def _resolved(self, source: Source) -> object:
        try:
            return source.get_value(self._scope, {}, self._resolving)
        except Exception as error:  # whatever a user's attribute raises
            raise UnlikeError from error

    def _origin(self, proxy: Proxy) -> int | str | Source:
        """Where something captured is from: the number of a leaf, a source, or a symbol."""
        for number, leaf in enumerate(self._leaves):
            if isinstance(leaf, TensorVariable) and leaf.as_proxy().node is proxy.node:
                return number
        example = proxy.node.meta["example_value"]
        if isinstance(example, sizes.SYMBOLIC):
            return str(example)
        argument = proxy.node.meta.get("grapharg")
        if argument is None or argument.source is None or argument.pass_arg_as_tensor:
            raise UnlikeError
        return cast("Source", argument.source)

    def _counterparts(self, known: _Known) -> list[Proxy]:
        self._around.check(self._tx)
        known.call._around.equal(self._around)
        same = _Same()
        for old, new in zip(known.call._values, self._values, strict=True):
            same(old, new)
        moves = dict(zip(filter(None, known.call._sources), filter(None, self._sources), strict=True))

        @functools.cache
        def moved(source: Source) -> Source:
            return source.clone(lambda s: moves.get(s, s))

        for source, value in known.values:
            same.looked_up(value, self._resolved(moved(source)) if source else value)
        guards = []
        for guard in known.guards:
            there = moved(guard.originating_source)
            guards.append((_moved(guard, there), there))
            if guard.create_fn_name() not in _BY_VALUE:
                same.identical(known.call._resolved(guard.originating_source), self._resolved(there))
        # From here on the frame changes, as it would by reading.
        proxies = [self._proxy(moved(origin) if isinstance(origin, Source) else origin) for origin, _ in known.captured]
        for proxy, (_, example) in zip(proxies, known.captured, strict=True):
            _equal(proxy.node.meta["example_value"], example)
        for new, source in guards:
            if new is None:
                self._proxy(source)
            else:
                self._tx.output.guards.add(new)
        self._tx.output.guard_on_key_order.update(map(moved, known.ordered))
        return proxies

    def _proxy(self, origin: int | str | Source) -> Proxy:
        if isinstance(origin, int):
            return cast("Proxy", self._leaves[origin].as_proxy())
        if isinstance(origin, Source):
            return cast("Proxy", VariableBuilder(self._tx, origin)(self._resolved(origin)).as_proxy())
        for symbol, proxy in self._tx.output.current_tracer.bound_symbols.items():
            if str(symbol) == origin and isinstance(proxy, Proxy):
                return proxy
        raise UnlikeError


_MANY = 4  # with how many calls of the same code one is compared
_LEAVES = (TensorVariable, UnspecializedNNModuleVariable, UnspecializedBuiltinNNModuleVariable)


@dataclasses.dataclass(frozen=True)
class _Known:
    """What was read for a call.

    Args:
        result: What is given for a call like it.
        call: The call.
        captured: What it captured: where it is from, and a stand-in.
        values: What Dynamo looked up, and where, if it is part of what the subgraph closes over.
        guards: What must hold for it.
        ordered: Dictionaries whose order counts.
    """

    result: object
    call: Call[object]
    captured: Sequence[tuple[int | str | Source, object]]
    values: Sequence[tuple[Source | None, object]]
    guards: Sequence[Guard]
    ordered: Sequence[Source]


_all: weakref.WeakKeyDictionary[TracingContext, dict[object, list[_Known]]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class _Around:
    """The state around a call: that of torch, and the ``with`` blocks it is in."""

    torch: GlobalStateGuard
    contexts: tuple[object, ...]

    @classmethod
    def of(cls, tx: InstructionTranslatorBase) -> _Around:
        contexts = list[object]()
        frame: InstructionTranslatorBase | None = tx
        while frame is not None:
            contexts.extend(block.with_context for block in frame.block_stack if block.with_context)
            frame = frame.parent
        return cls(GlobalStateGuard(), tuple(contexts))

    def check(self, tx: InstructionTranslatorBase) -> None:
        """Nothing that was there before the frame is written to, and torch is as it was."""
        effects = tx.output.side_effects
        modes = tx.symbolic_torch_function_state.mode_stack
        if effects.mutated_sources or modes or tx.output.random_calls or not self.torch.check():
            raise UnlikeError
        if any(not isinstance(v.mutation_type, AttributeMutationNew) for v in effects.store_attr_mutations):
            raise UnlikeError
        kinds = [v.mutation_type for v in effects.id_to_variable.values()]
        if any(isinstance(kind, ValueMutationExisting) and kind.is_modified for kind in kinds):
            raise UnlikeError

    def equal(self, other: _Around) -> None:
        """The other is the same; both hold now what they held when they were made."""
        if not self.torch.check() or list(map(id, self.contexts)) != list(map(id, other.contexts)):
            raise UnlikeError


class _Same:
    """Two structures of values as one and the same, piece by piece; what is shared in one is shared in the other."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[object, object]] = {}
        self._taken: dict[int, object] = {}

    def __call__(self, old: object, new: object) -> None:
        if type(old) is not type(new):
            raise UnlikeError
        if type(old) in _CONSTANTS:
            _equal(old, new)
            return
        if id(old) in self._pairs:
            self.identical(self._pairs[id(old)][1], new)
            return
        if id(new) in self._taken:
            raise UnlikeError
        self._pairs[id(old)], self._taken[id(new)] = (old, new), new
        if isinstance(old, torch.Tensor):
            _equal(_told(old), _told(new))
            if not isinstance(old, FakeTensor):
                self(vars(old), vars(new))
                self(old.grad if old.is_leaf else None, cast("torch.Tensor", new).grad if old.is_leaf else None)
        elif isinstance(old, torch.nn.Module) and type(old).__basicsize__ == torch.nn.Module.__basicsize__:
            self(vars(old), vars(new))
        elif type(old) in _CONTAINERS:
            for pair in zip(*_parts(old, new), strict=True):
                self(*pair)
        else:
            self.identical(old, new)

    def looked_up(self, old: object, new: object) -> None:
        """What Dynamo found at two places that are one and the same."""
        if type(old) is not type(new):
            raise UnlikeError
        if type(old) in _CONSTANTS:
            _equal(old, new)
        elif id(old) in self._pairs:
            self.identical(self._pairs[id(old)][1], new)
        elif id(new) in self._taken:
            raise UnlikeError
        elif isinstance(old, types.MethodType):
            bound = cast("types.MethodType", new)
            self.looked_up((old.__func__, old.__self__), (bound.__func__, bound.__self__))
        elif type(old) in _CONTAINERS or isinstance(old, tuple):  # what is in it may be told by what it is
            for pair in zip(*_parts(old, new), strict=True):
                self.looked_up(*pair)
        elif hasattr(old, "__iter__") and not isinstance(old, (type, torch.Tensor, torch.nn.Module)):
            raise UnlikeError
        else:
            self.identical(old, new)

    def identical(self, old: object, new: object) -> None:
        """Both are one object."""
        if old is not new:
            raise UnlikeError


def _parts(old: object, new: object) -> tuple[list[object], list[object]]:
    parts = list[list[object]]()
    for value in (old, new):
        if isinstance(value, dict):
            parts.append([part for item in value.items() for part in item])
        elif isinstance(value, (set, frozenset)):
            parts.append(list[object](sorted(map(_told, value))))
        else:
            parts.append(list(cast("Sequence[object]", value)))
    if len(parts[0]) != len(parts[1]):
        raise UnlikeError
    return parts[0], parts[1]


def _equal(old: object, new: object) -> None:
    if _told(old) != _told(new):
        raise UnlikeError


def _told(value: object) -> str:
    """What a constant, a symbol or a tensor says of itself."""
    if type(value) in _CONSTANTS or isinstance(value, sizes.SYMBOLIC):
        return f"{type(value).__name__} {value!r}"
    if type(value) not in _TENSORS:
        raise UnlikeError
    x = cast("torch.Tensor", value)
    if x.layout is not torch.strided:
        raise UnlikeError
    where = (*x.shape, "", *x.stride(), "", x.storage_offset(), x.device, x.dtype)
    flags = (x.requires_grad, x.is_leaf, x.is_conj(), x.is_neg(), x.is_inference())
    return " ".join(map(str, (type(x).__name__, *where, *flags)))


_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, type(...), range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset, torch.Size)
_TENSORS = (torch.Tensor, torch.nn.Parameter, FakeTensor)
_BY_VALUE = frozenset(
    {
        *("TYPE_MATCH", "TENSOR_MATCH", "CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "HASATTR"),
        *("DICT_CONTAINS", "DICT_NOT_CONTAINS", "DICT_KEYS_MATCH", "SEQUENCE_LENGTH", "NOT_PRESENT_IN_GENERIC_DICT"),
        "EMPTY_NN_MODULE_HOOKS_DICT",
    }
)
"""Guards that say nothing of which object it is."""


def _plain(source: Source) -> Source:
    """A source without what is said of modules: attributes are looked up with it, and without."""
    return _plain(source.base) if isinstance(source, UnspecializedNNModuleSource) else source


def _under(source: Source, roots: set[Source]) -> bool:
    met = set[Source]()

    def meet(source: Source) -> Source:
        met.add(source)
        return source

    source.clone(meet)
    return not roots.isdisjoint(met)


def _moved(guard: Guard, source: Source) -> Guard | None:
    """The guard at another place. None: of a tensor, which has its guard from where it is looked up."""
    fn = guard.create_fn
    if source == guard.originating_source:
        return guard
    if isinstance(fn, functools.partial):
        if fn.func is GuardBuilder.TENSOR_MATCH:
            return None
        if fn.args or any(type(value) not in _CONSTANTS for value in fn.keywords.values()):
            raise UnlikeError
    new = source.make_guard(fn)
    new.stack, new.user_stack = guard.stack, guard.user_stack
    return new
