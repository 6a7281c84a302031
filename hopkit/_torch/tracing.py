"""The proxy tracer's side of an op (torch/fx/experimental/proxy_tensor.py)."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch._functorch import predispatch
from torch._guards import detect_fake_mode
from torch._higher_order_ops.utils import reenter_make_fx
from torch._prims.rng_prims import run_and_save_rng_state
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.utils.checkpoint import CheckpointPolicy

from hopkit._torch import fakes, levels, sizes, trees
from hopkit._torch.autograd import computed, unhooked
from hopkit._torch.constant import AS_DETACHED, Telling, is_constant

T = TypeVar("T")

_traced: weakref.WeakKeyDictionary[PythonKeyTracer, dict[object, str]] = weakref.WeakKeyDictionary()

_lifted: weakref.WeakKeyDictionary[GraphModule, tuple[torch.Tensor, ...]] = weakref.WeakKeyDictionary()

_known: weakref.WeakKeyDictionary[PythonKeyTracer, dict[object, object]] = weakref.WeakKeyDictionary()

Decompositions = Mapping[torch._ops.OpOverload, Callable[..., object]]

ProxyMode = ProxyTorchDispatchMode


class Tracer:
    """The graph that is being recorded."""

    def __init__(self, mode: ProxyTorchDispatchMode, inputs: Sequence[object]) -> None:
        # Its other tracer never gets as far as an operator.
        self._mode, self._tracer = mode, cast("PythonKeyTracer", mode.tracer)
        self._fake_mode = detect_fake_mode(inputs)

    @property
    def above_autograd(self) -> bool:
        """Whether what is recorded is recorded before autograd sees it, as in export."""
        return bool(self._mode.pre_dispatch)

    def trace(
        self, name: str, function: Callable[..., object], examples: Sequence[object], key: object, *, gradients: bool
    ) -> GraphModule:
        """``function`` as a graph, registered under ``name`` (or ``name_1`` ...); equal keys share one graph."""
        known = _traced.setdefault(self._tracer, {})
        if key not in known:
            # The symbols of sizes that nobody knows belong to the mode of the examples.
            mode = self._fake_mode or fakes.Stage(trees.leaves(examples)).mode

            def stand_in(example: torch.Tensor) -> torch.Tensor:
                fake = fakes.stand_in(example, mode)
                return fake if example.is_leaf else computed(fake)

            inside = contextlib.nullcontext() if self._fake_mode else mode
            # Transforms that are active are around the program that is recorded.
            with levels.cleared(), fakes.autograd_on(), unhooked():
                inputs = trees.map_only(torch.Tensor, stand_in, tuple(examples))
                told = Telling() if gradients else contextlib.nullcontext()
                with inside, fakes.zeros_have_memory(), torch.set_grad_enabled(gradients), told:
                    graph = reenter_make_fx(function)(*cast("tuple[object, ...]", inputs))
            _tidy(graph)
            known[key] = self.register(name, graph)
        return cast("GraphModule", getattr(self._tracer.root, known[key]))

    def register(self, name: str, graph: torch.nn.Module) -> str:
        """Make ``graph`` a submodule of the graph being recorded; gives the name it got."""
        root = self._tracer.root
        for taken, module in root.named_children():
            if module is graph:
                return taken
        free, count = name, 0
        while hasattr(root, free):
            count += 1
            free = f"{name}_{count}"
        root.register_module(free, graph)
        return free

    def lift(self, graph: GraphModule) -> tuple[torch.Tensor, ...]:
        """Make inputs of a graph's constants, after those it has; gives the constants.

        torch saves those of a program, and not those of a graph within.
        """
        if graph not in _lifted:
            mode = self._fake_mode or fakes.Stage(()).mode
            constants: dict[str, torch.Tensor] = {}
            for node in graph.graph.find_nodes(op="get_attr"):
                value = attribute(graph, node.target)
                if isinstance(value, torch.Tensor):
                    constants[node.target] = value
            *_, last = [None, *graph.graph.find_nodes(op="placeholder")]
            for target, value in constants.items():
                with graph.graph.inserting_after(last) if last else graph.graph.inserting_before():
                    last = graph.graph.placeholder(target.rpartition(".")[2].strip("_"))
                last.meta["val"] = fakes.stand_in(value, mode)
                for node in graph.graph.find_nodes(op="get_attr"):
                    if node.target == target:
                        node.replace_all_uses_with(last)
                        graph.graph.erase_node(node)
                path, _, name = target.rpartition(".")
                delattr(attribute(graph, path), name)  # or the outer graph would take it from here
            graph.recompile()
            _lifted[graph] = tuple(constants.values())
        return _lifted[graph]

    def like(self, graph: GraphModule) -> tuple[torch.Tensor, ...] | None:
        """New stand-ins of what a traced graph gives. None: every call has names of its own for their sizes."""
        (output,) = graph.graph.find_nodes(op="output")
        values = [node and node.meta.get("val") for node in cast("Sequence[Node | None]", output.args[0])]
        tensors = [value for value in values if type(value) is FakeTensor and value.fake_mode is self._fake_mode]
        if len(tensors) < len(values) or any(
            map(sizes.unbacked, (n for t in tensors for n in (*t.shape, *t.stride())))
        ):
            return None
        with fakes.outside_modes(), cast("FakeTensorMode", self._fake_mode):
            return tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors)

    def settled(self, value: object, keep: Callable[[torch.Tensor], torch.Tensor]) -> object:
        """``value``; a tensor that the graph computes in an operator passes through ``keep``."""
        if not isinstance(value, torch.Tensor) or value.dim() < _CONVOLVED or 0 in value.stride():
            return value
        node = getattr(self._tracer.unwrap_proxy(value), "node", None)
        made_by = node and (node.args[0] if node.target is operator.getitem else node)
        if made_by is None or made_by.op != "call_function" or made_by.target is _invoke_subgraph:
            return value
        with self._mode:
            return keep(value)

    def emit(
        self,
        target: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        outputs: object,
    ) -> object:
        """Write the node ``target(*args, **kwargs)``, and let ``outputs`` be what it gives."""
        proxies = trees.map_leaves(cast("Callable[[object], object]", self._tracer.unwrap_proxy), args)
        node = self._tracer.create_proxy("call_function", target, proxies, dict(kwargs))
        if any(map(draws, args)):
            node.node.meta["recompute"] = CheckpointPolicy.MUST_SAVE  # again, other numbers would be drawn
        return track_tensor_tree(outputs, node, constant=None, tracer=self._tracer)


def attribute(module: torch.nn.Module, path: str) -> object:
    """What a ``get_attr`` node names."""
    found: object = module
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


_invoke_subgraph = torch.ops.higher_order.invoke_subgraph

_CONVOLVED = 3
"""The fewest dimensions of what a convolution gives."""


def _tidy(graph: GraphModule) -> None:
    """Take out views of whole tensors that nobody uses: autograd makes them of what it saves.

    A graph with a ``detach`` would pass for one that detaches a part when it is recorded again, and in forward mode
    torch cannot always make a view of a stand-in.
    """
    before = len(graph.graph.nodes)
    for node in reversed(graph.graph.nodes):
        if node.target in _STEPS:
            node.meta.setdefault("val", None)  # export wants to know what every node gives
        if node.target in AS_DETACHED and (is_constant(node.args[0]) or all(map(is_constant, node.users))):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    if len(graph.graph.nodes) < before:
        graph.recompile()


def draws(graph: object) -> bool:
    """Whether this is a graph in which random numbers are drawn, in a graph that it has, too."""
    targets = _targets(graph)
    tags = (target.tags for target in targets if isinstance(target, torch._ops.OpOverload))
    return run_and_save_rng_state in targets or any(torch.Tag.nondeterministic_seeded in known for known in tags)


def draws_for_backward(graph: object) -> bool:
    """Whether this is a graph, or has one, that AOTAutograd made to train: it gives states, and has no derivative."""
    return run_and_save_rng_state in _targets(graph)


def _targets(graph: object) -> set[object]:
    modules = [m for m in graph.modules() if isinstance(m, GraphModule)] if isinstance(graph, GraphModule) else []
    return {node.target for module in modules for node in module.graph.nodes if node.op == "call_function"}


# Above autograd a tracer writes down how a level of a transform begins and ends.
_STEPS = (
    predispatch._vmap_increment_nesting,
    predispatch._vmap_decrement_nesting,
    predispatch._jvp_increment_nesting,
    predispatch._jvp_decrement_nesting,
    predispatch._enter_dual_level,
    predispatch._exit_dual_level,
    predispatch.lazy_load_decompositions,
)

for _step in _STEPS:  # of the graphs within a graph, export removes what no other node uses (torch/fx/graph.py)
    torch.fx.node.has_side_effect(_step)


def current(inputs: Sequence[object]) -> Tracer | None:
    """The graph that is being recorded, if there is one; ``inputs`` are those of a call."""
    mode = get_proxy_mode()
    return None if mode is None else Tracer(mode, inputs)


def gradients_changed() -> bool:
    """Whether the graph that is being recorded has turned gradients off here, or on, as code does above autograd.

    export makes a region of such a part if that is the first thing in it (torch/_export/passes/
    replace_set_grad_with_hop_pass.py). Where a node has graphs, they come first: the gradients would be on again.
    """
    found = _active().tracer.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    steps = [bool(node.args[0]) for node in found]
    return bool(steps) and (not steps[-1] or steps[0])


def not_recorded() -> contextlib.AbstractContextManager[object]:
    """Inside, nothing is recorded."""
    return disable_proxy_modes_tracing()


def remembered(key: object, make: Callable[[], T]) -> T:
    """What ``make`` gave for this key while the same graph was being recorded."""
    known = _known.setdefault(cast("PythonKeyTracer", _active().tracer), {})
    if key not in known:
        known[key] = make()
    return cast("T", known[key])


def decompositions() -> Decompositions:
    """The decompositions that apply to the graph that is being recorded."""
    return _active().decomposition_table


def _active() -> ProxyTorchDispatchMode:
    mode = get_proxy_mode()
    assert mode is not None, "nothing is being recorded"
    return mode
