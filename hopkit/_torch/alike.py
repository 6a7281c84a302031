"""Whether Dynamo would read a call of an op as it has read another: then it is written again, and not read.

What Dynamo reads depends on the code, on what the code reaches, and on the state around the call. Two calls are alike
if the code is the same object, nothing was written to so far, the state is the same, and what both are given and close
over is equal piece by piece, with the same sharing: types, constants, modules' attributes and hooks, what tensors say
of themselves. What Dynamo looks up elsewhere must know nothing of a call's own objects. In doubt calls are not alike.

Private to torch (torch/_dynamo/output_graph.py, side_effects.py, torch/_guards.py, seen in 2.13 and 2.14). Only
`hopkit._torch.frame` imports this module; if something here is gone, leave `Frame.again` out: each call is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar, cast

from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo.exc import Unsupported
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import unpack_iterable
from torch._dynamo.variables import (
    ConstantVariable,
    ListVariable,
    NestedUserFunctionVariable,
    SymNodeVariable,
    TensorVariable,
    TorchInGraphFunctionVariable,
    TupleVariable,
    UnspecializedNNModuleVariable,
    UserFunctionVariable,
)
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationExisting, VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.nn_module import UnspecializedBuiltinNNModuleVariable
from torch._guards import Guard, Source, TracingContext
from torch.fx import Proxy

from hopkit._torch import sizes, sources
from hopkit._torch.likeness import Likeness, UnlikeError, refuse_identity, told
from hopkit._torch.watch import Same

N = TypeVar("N")


class Call(Generic[N]):
    """A call of an op, to be compared with those before it.

    Args:
        tx: Dynamo's own.
        target: What is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        UnlikeError: It cannot be compared.
    """

    def __init__(
        self,
        tx: InstructionTranslatorBase,
        target: object,
        args: Sequence[VariableTracker],
        kwargs: Mapping[str, VariableTracker],
    ) -> None:
        self._tx, self._around = tx, _Around.of(tx)
        self._scope = {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}
        self._resolving: dict[Source, object] = {}
        self._leaves: list[VariableTracker] = []
        self._walking: list[VariableTracker] = []
        self._around.check(tx)
        self._key = (Same(target), tuple(map(self._walk, args)), tuple((n, self._walk(v)) for n, v in kwargs.items()))
        self._sources = [sources.plain(leaf.source) if leaf.source else None for leaf in self._leaves]
        self._values = [self._value(leaf, source) for leaf, source in zip(self._leaves, self._sources, strict=True)]
        self._looked_up = set[Source]()

    def found(self) -> tuple[N, list[Proxy]] | None:
        """The node of a call like this one, and the inputs that it has here."""
        for known in self._known()[-_MANY:]:
            try:
                return cast("N", known.node), self._counterparts(known)
            except UnlikeError:
                continue
        return None

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Inside, Dynamo reads a subgraph of this call. It is noted where it looks, for the first time or again."""
        looked_up, output = self._looked_up, self._tx.output

        class Cache(dict[Source, VariableTracker]):
            def get(self, key: Source, default: object = None) -> object:  # type: ignore[override]
                looked_up.add(key)
                return super().get(key, default)

        before = output.variable_tracker_cache
        output.variable_tracker_cache = cache = Cache(before)
        try:
            yield
        finally:
            before.update(cache)
            output.variable_tracker_cache = before

    def keep(self, node: N, inputs: Sequence[Proxy]) -> None:
        """Remember the node that was written for this call, and its inputs."""
        output, roots = self._tx.output, {source for source in self._sources if source}

        @functools.cache
        def under(source: Source) -> bool:
            return source in roots or any(under(part) for _, part in sources.parts(source))

        try:
            origins = [self._origin(proxy) for proxy in inputs]
            for source in self._looked_up:
                if not under(source):
                    refuse_identity(self._resolved(source))
                elif source.name in output.unspec_variable_map:  # a number that may change has its guards elsewhere
                    raise UnlikeError
        except UnlikeError:
            return
        guards = [guard for guard in output.guards if under(guard.originating_source)]
        ordered = [source for source in output.guard_on_key_order if under(source)]
        self._known().append(_Known(node, cast("Call[object]", self), origins, guards, ordered))

    def _known(self) -> list[_Known]:
        known = _all.setdefault(self._tx.output.tracing_context, {})
        return known.setdefault(self._key, [])

    def _walk(self, variable: VariableTracker) -> object:
        """What a variable is made of, but for modules and tensors, which are noted."""
        variable = variable.realize()
        if type(variable) is NestedUserFunctionVariable:
            if variable.kwdefaults or variable in self._walking:
                raise UnlikeError
            cells = unpack_iterable(self._tx, variable.closure) if variable.closure else []
            try:
                closed = [self._tx.output.side_effects.load_cell(cell) for cell in cells]
            except Unsupported as error:  # not set yet
                raise UnlikeError from error
            defaults = unpack_iterable(self._tx, variable.defaults) if variable.defaults else []
            self._walking.append(variable)
            held = [self._walk(value) for value in (*closed, *defaults)]
            self._walking.pop()
            return variable.get_code(), *held
        if type(variable) in (TupleVariable, ListVariable):
            return type(variable), *map(self._walk, unpack_iterable(self._tx, variable))
        if type(variable) is ConstantVariable:
            return told(variable.value)
        if type(variable) is SymNodeVariable:
            return told(variable.sym_num)
        if type(variable) is UserFunctionVariable:
            return Same(variable.get_function())
        if type(variable) is TorchInGraphFunctionVariable:
            return Same(variable.value)
        if type(variable) not in _LEAVES:
            raise UnlikeError
        number = next((n for n, leaf in enumerate(self._leaves) if leaf is variable), len(self._leaves))
        if number == len(self._leaves):
            self._leaves.append(variable)
        return type(variable), number, variable.source is None

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
        """Where an input of the node is from: the number of a leaf, a source, or a symbol."""
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
        known.call._around.equal(self._around)
        same = Likeness()
        for old, new in zip(known.call._values, self._values, strict=True):
            same(old, new)
        moves = {old: new for old, new in zip(known.call._sources, self._sources, strict=True) if old and new}

        @functools.cache
        def moved(source: Source) -> Source:
            if source in moves:
                return moves[source]
            parts = {name: moved(part) for name, part in sources.parts(source)}
            if all(part is getattr(source, name) for name, part in parts.items()):
                return source
            return dataclasses.replace(source, **parts)

        guards = []
        for guard in known.guards:
            there = moved(guard.originating_source)
            guards.append((sources.moved(guard, there), there))
            if guard.create_fn_name() not in sources.BY_VALUE:
                same.identical(known.call._resolved(guard.originating_source), self._resolved(there))
        # From here on the frame changes, as it would by reading.
        proxies = [self._proxy(moved(origin) if isinstance(origin, Source) else origin) for origin in known.inputs]
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
    """A node that was written for a call.

    Args:
        node: What is given for a call like it.
        call: The call.
        inputs: Where each of the node's inputs is from.
        guards: What must hold of what the call is given and closes over.
        ordered: Dictionaries whose order counts.
    """

    node: object
    call: Call[object]
    inputs: Sequence[int | str | Source]
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
        """Nothing that was there before the frame is written to."""
        effects = tx.output.side_effects
        if any(not isinstance(v.mutation_type, AttributeMutationNew) for v in effects.store_attr_mutations):
            raise UnlikeError
        kinds = [v.mutation_type for v in effects.id_to_variable.values()]
        if any(isinstance(kind, ValueMutationExisting) and kind.is_modified for kind in kinds):
            raise UnlikeError

    def equal(self, other: _Around) -> None:
        """The other is the same; both hold now what they held when they were made."""
        if not self.torch.check() or list(map(id, self.contexts)) != list(map(id, other.contexts)):
            raise UnlikeError
