"""What constant graphs gave, kept until a weight changes.

A result is good while every argument is the same tensor, and is as it was (`Seen`), and so is the result. What nobody
can see are writes through ``tensor.data``, which `refresh` is for, and under inference mode to tensors that were made
there, which are never kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch.fx import GraphModule

from hopkit.extend import Call
from hopkit.extend.device import Seen, alone

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

Graph = Callable[..., Sequence[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Stats:
    """What the constant graphs of a model have done.

    Args:
        hits: Calls that found their results.
        misses: Calls that computed them.
        bytes: What is kept.
        seconds: How long computing took, in all.
    """

    hits: int
    misses: int
    bytes: int
    seconds: float


def kept(graph: Callable[..., object], args: tuple[object, ...]) -> object:
    """``graph(*args)``, from an earlier call where nothing has changed since."""
    own = graph if isinstance(graph, GraphModule) else _recorded(graph)
    memory = None if own is None else _memories.get(own)
    if memory is not None and (results := memory.at_rest(args)) is not None:
        return results
    if own is None or not alone():
        return graph(*args)
    if memory is None:
        memory = _memories.setdefault(own, Memory())
    return memory.results(cast("Graph", graph), args)


def known(graph: GraphModule, args: tuple[object, ...], *, ahead: bool) -> tuple[torch.Tensor, ...] | None:
    """``graph(*args)`` without gradients and without autocast, if that is kept; otherwise None.

    Args:
        graph: A graph.
        args: Weights. Those on a GPU are not kept here: whoever reads them on another stream would not wait.
        ahead: Whether the call that takes it is yet to come.
    """
    if not alone():
        return None
    memory = _memories.get(graph) or _memories.setdefault(graph, Memory())
    with contextlib.ExitStack() as stack:
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for kind in _casting():
            stack.enter_context(torch.autocast(kind, enabled=False))
        return memory.known(cast("Graph", graph), args, ahead=ahead)


def _recorded(graph: object) -> GraphModule | None:
    """The graph in a node that is run, where it is one graph and closes over nothing."""
    if not isinstance(graph, Recorded) or graph.captures:
        return None
    (own,) = graph.graphs if len(graph.graphs) == 1 else (None,)
    return own if isinstance(own, GraphModule) else None


@runtime_checkable
class Recorded(Protocol):
    """A subgraph of a node, which hopkit looks up for what it is called with."""

    @property
    def graphs(self) -> Sequence[object]: ...

    @property
    def captures(self) -> Sequence[object]: ...


class Memory:
    """The results of one graph, by the state of the thread that they were computed in."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.entries: dict[object, Entry] = {}
        self.seen: Seen | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the results, and the figures."""
        self.entries.clear()
        self.hits = self.misses = 0
        self.seconds = 0.0

    def at_rest(self, args: tuple[object, ...]) -> Sequence[torch.Tensor] | None:
        """The short way to `results`: where nothing is active, nobody asks for gradients, and nothing has changed."""
        entry = self.entries.get(_REST)
        if entry is None or not entry.at_rest(args):
            return None
        self.hits += 1
        return entry.results

    def results(self, graph: Graph, args: tuple[object, ...]) -> Sequence[torch.Tensor]:
        """``graph(*args)``."""
        if _capturing():
            return graph(*args)
        state = _state(args)
        entry = self._held(state, args)
        if entry is None:
            with self._lock:  # whoever waited here may find it done
                entry = self._held(state, args)
                if entry is None:
                    return self._compute(graph, state, args)
        self.hits += 1
        return entry.given(graph, args)

    def known(self, graph: Graph, args: tuple[object, ...], *, ahead: bool) -> tuple[torch.Tensor, ...] | None:
        """What `results` gives where nothing is active. None: it would not be kept.

        Args:
            graph: As for `results`.
            args: As for `results`.
            ahead: Whether this is no call yet, and one will follow.
        """
        entry = self._held(_REST, args)
        if entry is None:
            with self._lock:  # whoever waited here may find it done
                entry = self._held(_REST, args)
                if entry is None:
                    if not all(map(_tells, args)) or _on_cuda(cast("Sequence[torch.Tensor]", args)):
                        return None
                    self._compute(graph, _REST, args)
                    entry = self.entries.get(_REST)
                    if entry is not None:
                        entry.ahead = ahead
                    return None if entry is None else entry.results
        if not ahead:
            self.hits += not entry.ahead
            entry.ahead = False
        return entry.results

    def _held(self, state: object, args: tuple[object, ...]) -> Entry | None:
        entry = self.entries.get(state)
        return entry if entry is not None and entry.holds(args) else None

    def _compute(self, graph: Graph, state: object, args: tuple[object, ...]) -> Sequence[torch.Tensor]:
        if not all(map(_tells, args)):
            return graph(*args)
        self.misses += 1
        self.entries.pop(state, None)
        start = time.perf_counter()
        weights = cast("tuple[torch.Tensor, ...]", args)
        entry = Entry(graph, weights, functools.partial(_forget, weakref.ref(self), state))
        self.seen = entry.seen
        self.seconds += time.perf_counter() - start
        if entry.sound:
            self.entries[state] = entry
        return entry.given(graph, args)


def _forget(memory: weakref.ref[Memory], state: object) -> None:
    """Let go of what was computed from a weight that is gone."""
    if (found := memory()) is not None:
        found.entries.pop(state, None)


class Entry:
    """Results, and how all was when they were computed. It holds neither the graph, which holds it, nor the weights."""

    def __init__(self, graph: Graph, args: tuple[torch.Tensor, ...], lost: Callable[[], object]) -> None:
        before = Seen(args)
        self._wanted = [torch.is_grad_enabled() and arg.requires_grad for arg in args]
        self.ahead = False  # whether it was computed for a call that is yet to come
        self._untold = not torch.is_grad_enabled() and any(arg.requires_grad for arg in args)
        self._bare = not (any(self._wanted) or self._untold)
        self._leaves = [arg.detach().requires_grad_(want) for arg, want in zip(args, self._wanted, strict=True)]
        # Results that were made under inference mode would tell nobody that they are written to.
        with torch.inference_mode(False), torch.set_grad_enabled(any(self._wanted)):
            self._outputs = tuple(graph(*self._leaves))
        if not any(self._wanted):
            self._leaves = []
        self.results = tuple(output.detach() for output in self._outputs)
        self.seen = Seen(args, lost, beside=self.results)
        # Nobody has written to a weight meanwhile, and who reads it on another stream has another one (`_state`).
        self.sound = before.holds(args) and (_on_cuda(args) or not _on_cuda(self.results))

    def at_rest(self, args: tuple[object, ...]) -> bool:
        """Whether the results are those for ``args``, and nobody asks for gradients, nor may change them."""
        return (self._bare or not torch.is_grad_enabled()) and self.seen.at_rest((*args, *self.results))

    def holds(self, args: tuple[object, ...]) -> bool:
        """Whether the results are those for ``args``, today."""
        return not (self._untold and torch.is_grad_enabled()) and self.seen.holds((*args, *self.results))

    def given(self, graph: Graph, args: tuple[object, ...]) -> Sequence[torch.Tensor]:
        """The results; where gradients are wanted, with the way to the weights."""
        if not (torch.is_grad_enabled() and any(self._wanted)):
            return self.results
        results = _Kept.apply(self, graph, *args)  # type: ignore[no-untyped-call] # torch's own
        return cast("Sequence[torch.Tensor]", results)

    def gradients(
        self, graph: Graph, args: Sequence[torch.Tensor], given: Sequence[torch.Tensor | None]
    ) -> Iterator[torch.Tensor | None]:
        """The gradients of the arguments, for those of the results."""
        wanted = [number for number, want in enumerate(self._wanted) if want]
        outputs, sources = self._outputs, self._leaves
        if torch.is_grad_enabled():  # a second derivative goes on to the arguments themselves
            sources = list(args)
            outputs = tuple(graph(*args))
        pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [sources[number] for number in wanted],
                [g for _, g in pairs],
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            if pairs
            else [None] * len(wanted)
        )
        for want in self._wanted:
            yield next(found) if want else None


class _Kept(torch.autograd.Function):
    """Results that were computed before, as if they were computed here."""

    @staticmethod
    def forward(ctx: Any, entry: Entry, graph: Graph, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.entry, ctx.graph = entry, graph
        ctx.save_for_backward(*args)
        return tuple(result.detach() for result in entry.results)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return (None, None, *ctx.entry.gradients(ctx.graph, ctx.saved_tensors, given))


def _tells(tensor: object) -> bool:
    """Whether this is a tensor that shows that it was written to. What processes share another one may write to."""
    if type(tensor) not in _PLAIN:
        return False
    tensor = cast("torch.Tensor", tensor)
    shared = tensor.device.type == "cpu" and tensor.is_shared()
    return not (tensor.is_inference() or shared) and tensor.layout is torch.strided


def _casting() -> list[str]:
    """The kinds of device that autocast is on for."""
    return [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


def _state(args: Sequence[object]) -> object:
    """What else a result depends on."""
    casting = [(kind, torch.get_autocast_dtype(kind)) for kind in _casting()]
    there = args if torch.cuda.is_initialized() else ()
    device = next((t.device for t in there if isinstance(t, torch.Tensor) and t.is_cuda), None)
    stream = None if device is None else torch.cuda.current_stream(device)
    return *casting, stream


def _on_cuda(tensors: Sequence[torch.Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors)


_REST = (None,)
"""The state of a thread in which nothing is active, where there is one stream."""


def _capturing() -> bool:
    """Whether a CUDA graph is recorded: replayed, it is to compute anew from the weights of the day."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_memories: weakref.WeakKeyDictionary[torch.nn.Module, Memory] = weakref.WeakKeyDictionary()


def _of(model: torch.nn.Module) -> list[Memory]:
    """What the graphs in a model gave, and what compiled code computed from its weights."""
    weights = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    compiled = [memory for _, memory in list(_compiled.values()) if memory.seen is not None and memory.seen.of(weights)]
    return [*(_memories[module] for module in model.modules() if module in _memories), *compiled]


# -- compiled --------------------------------------------------------------------------------------------------------
_compiled: dict[str, tuple[Graph, Memory]] = {}
"""By the names in compiled code: graphs, and what they gave, which lives as long as what it was computed from."""

_library = torch.library.Library("hopkit_constgraph", "DEF")
# A CUDA graph would replay what follows with the memory of the day, and call nothing.
_library.define("kept(str name, Tensor[] args) -> Tensor[]", tags=(torch.Tag.cudagraph_unsafe,))


def remember(call: Call) -> str:
    """A name under which compiled code finds the graph of ``call``, and its results."""
    (graph,) = call.graphs
    own = call.replace(graphs=[getattr(graph, "graph_module", graph)])

    def run(*args: object) -> Sequence[torch.Tensor]:
        return cast("Sequence[torch.Tensor]", own.replace(inputs=args).run())

    name = f"{call.op.name} {len(_compiled)}"
    _compiled[name] = run, Memory()
    return name


def _run(name: str, args: list[torch.Tensor]) -> list[torch.Tensor]:
    graph, memory = _compiled[name]
    given = tuple(args)
    return list(memory.at_rest(given) or memory.results(graph, given))


def _like(name: str, args: list[torch.Tensor]) -> list[torch.Tensor]:
    graph, _ = _compiled[name]
    return [torch.empty_like(value) for value in graph(*args)]


_library.impl("kept", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hopkit_constgraph::kept", _like, lib=_library)

KEPT = torch.ops.hopkit_constgraph.kept.default

# -- for whoever has a folded model ----------------------------------------------------------------------------------


def stats(model: torch.nn.Module) -> Stats:
    """What the constant graphs in a folded model have done so far."""
    found = _of(model)
    results = [r for memory in found for entry in list(memory.entries.values()) for r in entry.results]
    return Stats(
        sum(memory.hits for memory in found),
        sum(memory.misses for memory in found),
        sum(result.numel() * result.element_size() for result in results),
        sum(memory.seconds for memory in found),
    )


def refresh(model: torch.nn.Module) -> None:
    """Let every constant graph in a model compute anew: after writes through ``weight.data``, which nobody can see."""
    for memory in _of(model):
        memory.entries.clear()


def clear(model: torch.nn.Module) -> None:
    """As `refresh`, and the figures of `stats` start again."""
    for memory in _of(model):
        memory.clear()
