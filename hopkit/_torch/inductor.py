"""Inductor at work (torch/_inductor; 2.13, 2.14).

If ``V.fake_mode`` is gone, ops stay nodes until they are lowered, and do not share in the passes before that.
"""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit._torch import trees


def compiling() -> bool:
    """Whether what is traced now will be compiled by Inductor."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    # A program that is packaged is traced before that mode is set.
    return virtualized is not None and (isinstance(virtualized.V.fake_mode, FakeTensorMode) or packaging())


def packaging() -> bool:
    """Whether the code is to run without Python."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and virtualized.V.aot_compilation is True


def lower(operator: Callable[..., object], rule: Callable[..., object]) -> None:
    """Let ``rule`` answer where Inductor meets a node of ``operator``. Call it while Inductor is at work."""
    from torch._inductor.lowering import register_lowering  # loaded with Inductor

    register_lowering(operator, type_promotion_kind=None)(rule)


def lowered(target: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    """What Inductor makes of another operator: its lowering, or a call of its kernel."""
    from torch._inductor.lowering import fallback_handler, lowerings

    return (lowerings.get(target) or fallback_handler(target))(*args, **kwargs)


def inlined(run: Callable[[Sequence[object]], object], name: str, inputs: Sequence[object]) -> tuple[object, ...]:
    """``run(inputs)`` in Inductor's terms, fused with what stands around it.

    Args:
        run: A function of tensors and integers.
        inputs: Inductor's own values, those of the node that is being lowered.
    """
    from torch._inductor.codegen.subgraph import inline_subgraph_to_ir_nodes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    lowering = V.graph
    values = torch.fx.map_arg(lowering.current_node.args, lambda node: node.meta.get("val"))
    fakes = cast("Sequence[object]", values[-1])
    with V.fake_mode:
        graph = make_fx(lambda *flat: tuple(trees.leaves(run(flat))), decomposition_table=select_decomp_table())(*fakes)
    return tuple(inline_subgraph_to_ir_nodes(graph, list(inputs), name))


def written(run: Callable[..., object], *args: object) -> tuple[object, str]:
    """What a compiled function gives, and the code that Inductor wrote for it; for tests."""
    from torch._inductor.utils import run_and_get_code

    result, code = run_and_get_code(run, *args)
    return result, "".join(code)


def outlined(graph: Callable[..., object]) -> Callable[..., object]:
    """``graph`` as a region of its own, whose code is compiled once for all calls of an equal graph on equal inputs."""
    if not isinstance(graph, GraphModule):
        return graph
    code = _code(graph) or uuid.uuid4().hex  # with values of its own it is equal to no other

    def call(*inputs: object) -> object:
        told = repr((code, torch.is_grad_enabled(), *map(_layout, inputs)))
        name = f"hopkit_{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        return torch.ops.higher_order.invoke_subgraph(graph, name, *inputs)

    return call


def _code(graph: GraphModule) -> str:
    """The code of a graph and of those inside it; "" where it holds tensors or modules, which no code tells."""
    inner = [module for name, module in graph.named_modules() if name]
    if any(not isinstance(module, GraphModule) for module in inner) or [*graph.parameters(), *graph.buffers()]:
        return ""
    held = (getattr(m, n.target, None) for m in (graph, *inner) for n in m.graph.find_nodes(op="get_attr"))
    if any(not isinstance(value, GraphModule) for value in held):
        return ""
    return "".join(module.code for module in (graph, *inner))


def _layout(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return str(value)
    return value.dtype, str(value.device), str(value.shape), str(value.stride()), value.requires_grad
