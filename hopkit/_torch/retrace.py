"""What a node of an op does, as a graph of its own (torch/fx/experimental/proxy_tensor.py; torch/_subclasses)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from hopkit._torch import fakes, levels, trees
from hopkit._torch.autograd import computed, differentiable, unhooked
from hopkit._torch.constant import Telling
from hopkit._torch.library import detached
from hopkit._torch.watch import custom_backward


class Lost(Exception):
    """A graph would give the same values, and other gradients.

    Args:
        reason: Why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def retrace(
    run: Callable[..., object],
    examples: Sequence[object],
    *,
    derivative: bool,
    functional: bool,
    written: Container[int] = (),
) -> GraphModule:
    """``run`` as a graph. While gradients are on, one that has the same gradients.

    Args:
        run: What is traced.
        examples: Stand-ins of its inputs; the values in the graph are in their fake mode.
        derivative: Whether ``run`` is a derivative.
        functional: Whether to leave no mutation in the graph.
        written: The numbers of inputs that may be written to.

    Raises:
        Lost: The gradients would be others.
    """
    watch, gradients = Telling(), torch.is_grad_enabled()

    def watched(*inputs: object) -> object:
        with watch:
            result = run(*inputs)
        if gradients and not derivative:
            watch.reason = custom_backward(trees.leaves(result)) or watch.reason
        return result

    with levels.cleared(), _mode_of(examples) as mode, unhooked():
        inputs = list(examples)
        for i, example in enumerate(examples):
            if isinstance(example, torch.Tensor):
                fake = fakes.stand_in(example, mode).requires_grad_(gradients and differentiable(example))
                inputs[i] = computed(fake) if i in written and fake.requires_grad else fake
        # The graph is for processes without hopkit.
        own = {torch.ops.hopkit.without_gradient.default: detached}
        graph = make_fx(torch.func.functionalize(watched) if functional else watched, own)(*inputs)
    if gradients and watch.reason:
        raise Lost(watch.reason)
    if derivative:
        _drop_detached(graph)
    graph.graph.eliminate_dead_code()
    return graph


@contextlib.contextmanager
def _mode_of(examples: Sequence[object]) -> Iterator[FakeTensorMode]:
    found = [e.fake_mode for e in examples if isinstance(e, FakeTensor) and e.fake_mode.shape_env is not None]
    mode = found[0] if found else fakes.Stage([]).mode
    assert mode.shape_env is not None
    # Its cache, which all modes share, takes a tensor of zeros that has no memory for any of its size (2.13, 2.14).
    uncached = disable_fake_tensor_cache(mode)
    foreign = mock.patch.object(mode, "allow_non_fake_inputs", True)
    with uncached, foreign, mode.shape_env.suppress_guards(), mode:
        yield mode


def _drop_detached(graph: GraphModule) -> None:
    """What autograd saved it detaches; the author has detached nothing, which was made sure of."""
    for node in list(graph.graph.nodes):
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def annotate(module: GraphModule, inputs: Sequence[object]) -> None:
    """Give every node of a graph a stand-in of its value (``node.meta["val"]``), whatever sizes are not 0 or 1."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    FakeTensorProp(module, mode).propagate(*inputs)


def rebind(node: Node, result: Any) -> None:
    """Let sizes that nobody knows keep the names they had: ``result`` is put in the place of ``node``."""
    from torch.fx.experimental.symbolic_shapes import rebind_unbacked

    values = map_arg(result, lambda n: n.meta["val"])
    modes = [v.fake_mode for v in trees.leaves(values) if isinstance(v, FakeTensor)]
    if modes:
        rebind_unbacked(modes[0].shape_env, node, values)
