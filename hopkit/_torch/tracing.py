"""The proxy tracer's side of an op (torch/fx/experimental/proxy_tensor.py)."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch._guards import detect_fake_mode
from torch._higher_order_ops.utils import reenter_make_fx
from torch._prims.rng_prims import run_and_save_rng_state
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.utils.checkpoint import CheckpointPolicy

from hopkit._torch import fakes, trees
from hopkit._torch.autograd import computed

T = TypeVar("T")

_traced: weakref.WeakKeyDictionary[PythonKeyTracer, dict[object, str]] = weakref.WeakKeyDictionary()

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

    def inside(self, run: Callable[[], T]) -> T:
        """What ``run`` gives, recorded operator by operator."""
        with self._mode:
            return run()

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

            inputs = trees.map_only(torch.Tensor, stand_in, tuple(examples))
            inside = contextlib.nullcontext() if self._fake_mode else mode
            with inside, fakes.autograd_on(), fakes.unhooked(), torch.set_grad_enabled(gradients):
                graph = reenter_make_fx(function)(*cast("tuple[object, ...]", inputs))
            _drop_saved(graph)
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
        if any(map(_draws, args)):
            node.node.meta["recompute"] = CheckpointPolicy.MUST_SAVE  # again, other numbers would be drawn
        return track_tensor_tree(outputs, node, constant=None, tracer=self._tracer)


def _drop_saved(graph: GraphModule) -> None:
    """What autograd saves it detaches, and a graph that is recorded again would pass for one that detaches a part."""
    before = len(graph.graph.nodes)
    for node in reversed(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default and not node.users:
            graph.graph.erase_node(node)
    if len(graph.graph.nodes) < before:
        graph.recompile()


def _draws(graph: object) -> bool:
    """Whether this is a graph in which random numbers are drawn."""
    modules = [m for m in graph.modules() if isinstance(m, GraphModule)] if isinstance(graph, GraphModule) else []
    targets = {node.target for module in modules for node in module.graph.nodes if node.op == "call_function"}
    tags = (target.tags for target in targets if isinstance(target, torch._ops.OpOverload))
    return run_and_save_rng_state in targets or any(torch.Tag.nondeterministic_seeded in known for known in tags)


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
