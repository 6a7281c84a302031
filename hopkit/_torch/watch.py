"""What a subgraph does while it runs: which tensors from outside it uses, what it writes to, whether it is random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import TypeVar, cast

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from typing_extensions import Self

from hopkit._torch import trees
from hopkit._torch.autograd import differentiable, versions
from hopkit._torch.constant import ASKED, OPAQUE, gives_constant, off, without_gradients
from hopkit._torch.fakes import same_storage
from hopkit._torch.sizes import SYMBOLIC, Describe, describe, symbols
from hopkit._torch.stance import out
from hopkit._torch.state import opaque

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Same:
    """Compares by identity, and keeps its object alive so that no other takes its id."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Substitute(TorchFunctionMode):
    """Puts one tensor in the place of another wherever Python code inside uses it: closure conversion, live."""

    def __init__(self, replace: Callable[[object], object], describe: Describe = describe) -> None:
        super().__init__()
        self.replace, self._describe = replace, describe
        self.steps: list[tuple[object, ...]] = []
        self._opaque = ""
        self._detached: list[tuple[torch.Tensor, list[int]]] = []  # of memory from elsewhere, and its version then
        self.compiles = ""  # the name of an operator that would have its functions compiled, with what they close over

    def __enter__(self) -> Self:
        out.enter()
        super().__enter__()  # type: ignore[no-untyped-call] # torch's own
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call] # torch's own
        out.leave()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # `Watch` sees operators, and attributes are read by torch too, whenever it likes.
        if not isinstance(func, torch._ops.OpOverload) and getattr(func, "__name__", "") != "__get__":
            constants = (_constant(leaf, self._describe) for leaf in trees.leaves((args, dict(kwargs or {}))))
            self.steps.append((func, *constants))
        if isinstance(func, HigherOrderOperator) and any(isinstance(leaf, FunctionType) for leaf in trees.leaves(args)):
            self.compiles = func.name()
        args, named = self.replaced((args, dict(kwargs or {})))
        # torch.func asks its own wrappers; the answer is the same whatever is traced.
        wrapped = isinstance(args[0], torch.Tensor) and is_functorch_wrapped_tensor(args[0]) if args else False
        if not (wrapped and func in ASKED):
            self._opaque = OPAQUE.get(func, "") or self._opaque
        if torch.is_grad_enabled():
            result = func(*args, **named)
        else:
            with without_gradients():
                result = func(*args, **named)
        if gives_constant(func):
            self._notice(result, [leaf for leaf in trees.leaves((args, named)) if isinstance(leaf, torch.Tensor)])
        return result

    def _notice(self, result: object, given: Sequence[torch.Tensor]) -> None:
        for tensor in (leaf for leaf in trees.leaves(result) if differentiable(leaf)):
            tensor = cast("torch.Tensor", tensor)
            if tensor.layout is not torch.strided or tensor.is_nested:
                self._opaque = "a part of it is detached, which is no dense tensor"
            elif not any(tensor is t for t in given) and any(same_storage(tensor, t) for t in given):
                self._detached.append((tensor, versions([tensor])))

    @property
    def opaque(self) -> str:
        """Why a graph of what ran inside, with what `Telling` says in it, has other derivatives, or ""."""
        if any(versions([tensor]) != version for tensor, version in self._detached):
            return "it writes to what it has detached"
        return self._opaque

    def replaced(self, value: T) -> T:
        """A pytree with every value replaced that has a stand-in."""
        return trees.map_leaves(self._leaf, value)

    def _leaf(self, leaf: object) -> object:
        if isinstance(leaf, _REPLACED):
            return self.replace(leaf)
        if isinstance(leaf, slice):  # no pytree, and yet it may hold sizes
            return slice(*map(self._leaf, (leaf.start, leaf.stop, leaf.step)))
        return leaf


def replaced(value: T) -> T:
    """A pytree as code that runs here sees it: with every value replaced that has a stand-in."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, Substitute):
            value = mode.replaced(value)
    return value


class Count(TorchDispatchMode):
    """How many operators ran that give tensors; to read a tensor's device is one that does not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.operators = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.operators += any(isinstance(leaf, torch.Tensor) for leaf in trees.leaves(result))
        return result


_REPLACED = (torch.Tensor, torch.SymInt, torch.SymFloat)
_PLAIN = (int, float, bool, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _constant(leaf: object, describe: Describe) -> object:
    """What can be compared of an argument that is no tensor."""
    if isinstance(leaf, torch.Tensor):
        return None
    if isinstance(leaf, slice):
        return tuple(_constant(part, describe) for part in (leaf.start, leaf.stop, leaf.step))
    if isinstance(leaf, SYMBOLIC):
        return f"{type(leaf)} {describe(cast('int', leaf))}"
    return f"{type(leaf)} {leaf}" if leaf is None or isinstance(leaf, _PLAIN) else Same(leaf)


def wiring(
    steps: Iterable[tuple[object, Sequence[object], Sequence[object]]],
    inputs: Sequence[object],
    outputs: Sequence[object],
    describe: Describe,
) -> list[object]:
    """Which operator takes what from which, and what comes out: equal for what would be traced to the same graph."""
    numbers = {id(value): number for number, value in reversed(list(enumerate(inputs)))}

    def told(leaf: object) -> object:
        known = isinstance(leaf, torch.Tensor)
        return numbers.setdefault(id(leaf), len(numbers)) if known else _constant(leaf, describe)

    flow = [(func, *map(told, args), "->", *map(told, results)) for func, args, results in steps]
    return [*flow, tuple(map(told, outputs))]


WITHOUT_GRADIENTS = "a part of it runs without gradients"


class Watch(TorchDispatchMode):
    """Sees every operator that runs inside, and passes it on."""

    supports_higher_order_operators = True

    def __init__(self, tracked: Container[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self._tracked = tracked
        self.random: dict[str, None] = {}  # the devices where random numbers are drawn
        self.reasons: dict[str, None] = {}
        self.written: list[torch.Tensor] = []
        self.hidden = False
        self.made: set[object] = set()  # symbols of sizes and numbers that only running tells
        self.steps: list[tuple[object, Sequence[object], Sequence[object]]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        random = False
        if torch.is_inference_mode_enabled() or not (torch.is_grad_enabled() or off()):
            self.reasons[WITHOUT_GRADIENTS] = None
        if isinstance(func, torch._ops.OpOverload):
            if func is torch.ops.aten.copy_.default:
                self.reasons["it copies into a tensor, and functionalized that has no derivative"] = None
            random = torch.Tag.nondeterministic_seeded in func.tags
            if random and any(isinstance(leaf, torch.Generator) for leaf in trees.leaves((args, kwargs))):
                self.reasons["it draws from a generator of its own"] = None
            if func._schema.is_mutable or func in _WRITE_STATISTICS:
                written = list(_writes(func, args, kwargs or {}))
                if not torch.is_grad_enabled() and any(t.requires_grad for t in written):
                    self.reasons["it writes to a tensor that has a gradient, and gradients are off"] = None
                self.written.extend(written)
        leaves = trees.leaves((args, kwargs))
        # Code that is no Python, such as a scripted module's, uses its tensors where nothing can replace them.
        self.hidden |= any(isinstance(t, torch.Tensor) and self._hides(t) for t in leaves)
        result = func(*args, **(kwargs or {}))
        # What gives no tensor asks for a device or a size, and torch asks only where it has not asked before.
        results = trees.leaves(result)
        if random:
            self.random.update(dict.fromkeys(str(t.device) for t in trees.tensors(results)))
        self.made |= symbols(results) - symbols(leaves)
        if any(isinstance(leaf, torch.Tensor) for leaf in results):
            self.steps.append((func, leaves, results))
        return result

    @property
    def opaque(self) -> str:
        """Why a graph of what ran inside cannot be differentiated, or ""."""
        return next(reversed(self.reasons), "")

    def _hides(self, tensor: torch.Tensor) -> bool:
        """Whether this is, or holds, a tensor from outside that is more than a constant."""
        if isinstance(tensor, FakeTensor):
            return False
        if is_traceable_wrapper_subclass(tensor):
            inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])  # a DTensor has a mesh there too
            return any(isinstance(held, torch.Tensor) and self._hides(held) for held in inner)
        if is_functorch_wrapped_tensor(tensor):
            return self._hides(get_unwrapped(tensor))
        return opaque(tensor) or tensor.requires_grad or tensor in self._tracked

    def casts(self, step: int) -> bool:
        """Whether step number ``step`` changes a tensor's dtype; autocast also does it by an operator's ``dtype=``."""
        func, leaves, _ = self.steps[step]
        return func is torch.ops.aten._to_copy.default or any(isinstance(leaf, torch.dtype) for leaf in leaves)

    def wrote_to(self, tensor: torch.Tensor, since: int = 0) -> bool:
        """Whether something inside wrote to the memory of ``tensor``, after the first ``since`` writes."""
        return any(same_storage(tensor, w) for w in self.written[since:])


_WRITE_STATISTICS = (
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten.cudnn_batch_norm.default,
    torch.ops.aten.miopen_batch_norm.default,
)
"""Operators whose schemas do not say that they write to their statistics in training."""

_TRAINING = 5  # the position of their argument of this name


def _writes(
    func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> Iterator[torch.Tensor]:
    training = func in _WRITE_STATISTICS and (args[_TRAINING] if len(args) > _TRAINING else kwargs["training"])
    unsaid = ("running_mean", "running_var") if training else ()
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in unsaid or (argument.alias_info is not None and argument.alias_info.is_write):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (t for t in trees.leaves(value) if isinstance(t, torch.Tensor))


def custom_backward(outputs: Sequence[object], inputs: Sequence[object] = ()) -> str:
    """Why the autograd graph from ``inputs`` to ``outputs`` cannot be had from the operators alone, or ""."""
    pending = [t.grad_fn for t in trees.tensors(list(outputs))]
    seen: set[object] = {t.grad_fn for t in trees.tensors(list(inputs))}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return f"it has a backward of its own ({type(node).__name__.removesuffix('Backward')})"
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
    return ""


def sources(output: object, leaves: Sequence[object]) -> tuple[int, ...]:
    """The numbers of the leaves that ``output`` has a gradient for."""
    reached = set(map(id, _roots(output)))
    return tuple(i for i, leaf in enumerate(leaves) if id(leaf) in reached)


def beyond(output: object, leaves: Sequence[object]) -> bool:
    """Whether ``output`` has a gradient for anything but these leaves."""
    return not set(map(id, _roots(output))).issubset(map(id, leaves))


def _roots(output: object) -> Iterator[object]:
    """The leaves that ``output`` has a gradient for; a node of the tape where it ends at none, as at `computed`."""
    if not isinstance(output, torch.Tensor) or not output.requires_grad:
        return
    if output.grad_fn is None:
        yield output
    pending = [output.grad_fn]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            before = [previous for previous, _ in node.next_functions if previous is not None]
            pending.extend(before)
            if not before:
                yield getattr(node, "variable", node)
