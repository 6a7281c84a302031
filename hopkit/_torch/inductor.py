"""Inductor at work (torch/_inductor; 2.13, 2.14).

If ``V.fake_mode`` is gone, ops stay nodes until they are lowered, and do not share in the passes before that. If
``_recursive_joint_graph_passes`` is gone, leave `simplified` out; if ``force_stride_order`` is, `of_layout`, and models
with convolutions between outlined regions are refused by Inductor ("subgraph args must have consistent values"); if
``bw_donated_idxs`` is, `keep_inputs`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch._guards import TracingContext
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


def untouched(value: object) -> object:
    """A value of Inductor's, in whose memory it is to put nothing else when it needs it no more."""
    from torch._inductor.virtualized import V

    lowering = V.graph
    lowering.never_reuse_buffers.add(cast("_Named", value).get_name())
    return value


def is_lowered(outputs: object) -> bool:
    """Whether these can be the outputs of a node: a tuple of Inductor's own values, and numbers."""
    return isinstance(outputs, (tuple, list)) and not any(isinstance(output, torch.Tensor) for output in outputs)


class _Named(Protocol):
    def get_name(self) -> str: ...


def written(run: Callable[..., object], *args: object) -> tuple[object, str]:
    """What a compiled function gives, and the code that Inductor wrote for it; for tests."""
    from torch._inductor.utils import run_and_get_code

    result, code = run_and_get_code(run, *args)
    return result, "".join(code)


def outlines() -> bool:
    """Whether what is traced now may call regions. Code without Python cannot (``codegen_invoke_subgraph``)."""
    if not compiling() or packaging():
        return False
    from torch._inductor import config

    return not config.cpp_wrapper


def keep_inputs() -> None:
    """Let no graph within a graph write over its inputs. Call it while Inductor is at work.

    A graph's backward may write over what was saved for it alone, by the numbers of its inputs, and torch goes by the
    same numbers in every graph inside: the second call of a region would find its gradient overwritten, and a branch
    the state of a loop, or a weight.
    """
    from torch._inductor.lowering import lowerings

    for name in ("invoke_subgraph", "cond", "while_loop", "while_loop_stack_output"):
        target = getattr(torch.ops.higher_order, name)
        lowering = lowerings.get(target)
        if lowering is not None and not getattr(lowering, "_hopkit", False):
            lowerings[target] = _keeping(lowering)


def _keeping(lowering: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(lowering)
    def kept(*args: object, **kwargs: object) -> object:
        context = TracingContext.try_get()  # a package has none
        metadata = context.fw_metadata if context else None
        if metadata is None:
            return lowering(*args, **kwargs)
        donated, metadata.bw_donated_idxs = metadata.bw_donated_idxs, None
        try:
            return lowering(*args, **kwargs)
        finally:
            metadata.bw_donated_idxs = donated

    kept._hopkit = True  # type: ignore[attr-defined]
    return kept


def simplified(graph: GraphModule) -> GraphModule:
    """A joint graph after Inductor's own passes: what they find, fused attention say, they find in no half of it."""
    from torch._inductor.compile_fx import _recursive_joint_graph_passes

    return _recursive_joint_graph_passes(graph, skip_invoke_subgraph=True)


def of_layout(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, in the memory layout that it has now, whatever Inductor makes of what computes it."""
    from torch._inductor.inductor_prims import force_stride_order

    return cast("torch.Tensor", force_stride_order(tensor, tensor.stride()))


def set_up(*, sizes_from_values: bool = False, **options: object) -> contextlib.AbstractContextManager[None]:
    """Inside, Inductor has these options, and Dynamo may read what only values tell the size of; for tests."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config

    stack = contextlib.ExitStack()
    stack.enter_context(config.patch(options))
    stack.enter_context(dynamo.patch(capture_dynamic_output_shape_ops=sizes_from_values))
    return cast("contextlib.AbstractContextManager[None]", stack)


def compiled_backward(backend: str) -> contextlib.AbstractContextManager[None]:
    """Inside, autograd's graph is compiled when it runs (CompiledAutograd); for tests."""
    from torch._dynamo import compiled_autograd

    return compiled_autograd._enable(lambda graph: torch.compile(graph, backend=backend))


def counting(backend: str, graphs: list[object]) -> Callable[..., object]:
    """A backend that also notes what it gets; for tests and benchmarks."""
    from torch._dynamo import lookup_backend

    def noted(graph: GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    return noted


def varies(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """``tensor``, with a size that Dynamo takes for one that changes; for tests."""
    from torch._dynamo import mark_dynamic

    mark_dynamic(tensor, dim)
    return tensor
