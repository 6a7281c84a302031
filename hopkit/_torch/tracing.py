"""The proxy tracer's side of an op (torch/fx/experimental/proxy_tensor.py)."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch._guards import detect_fake_mode
from torch._higher_order_ops.utils import reenter_make_fx
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer, track_tensor_tree

from hopkit._torch import fakes, trees

_traced: weakref.WeakKeyDictionary[PythonKeyTracer, dict[object, str]] = weakref.WeakKeyDictionary()


ProxyMode = ProxyTorchDispatchMode


class Tracer:
    """The graph that is being recorded."""

    def __init__(self, mode: ProxyTorchDispatchMode, inputs: Sequence[object]) -> None:
        # Its other tracer never gets as far as an operator.
        self._tracer = cast("PythonKeyTracer", mode.tracer)
        self._fake_mode = detect_fake_mode(inputs)

    def trace(
        self, name: str, function: Callable[..., object], examples: Sequence[object], key: object, *, gradients: bool
    ) -> GraphModule:
        """``function`` as a graph, registered under ``name`` (or ``name_1`` ...); equal keys share one graph."""
        known = _traced.setdefault(self._tracer, {})
        if key not in known:
            mode = self._fake_mode or fakes.Stage([]).mode
            inputs = [
                fakes.stand_in(e, mode).requires_grad_(False) if isinstance(e, torch.Tensor) else e for e in examples
            ]
            inside = contextlib.nullcontext() if self._fake_mode else mode
            with inside, fakes.autograd_on(), fakes.unhooked(), torch.set_grad_enabled(gradients):
                known[key] = self.register(name, reenter_make_fx(function)(*inputs))
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
        return track_tensor_tree(outputs, node, constant=None, tracer=self._tracer)
