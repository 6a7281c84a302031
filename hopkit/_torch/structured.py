"""torch's own operators for what is decided on values, which compilers know (torch/_higher_order_ops; 2.13, 2.14).

If ``while_loop_stack_output`` is gone, loops that train are called back; if ``cond``, ``while_loop`` or ``scan`` is, so
is what they stand for here.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit._torch import inductor, levels
from hopkit._torch.autograd import below_autograd
from hopkit._torch.checkpoint import taken_whole
from hopkit._torch.fakes import Stage, unfunctional
from hopkit._torch.tracing import attribute, draws

Flat = Callable[[Sequence[object]], Sequence[object]]
Tensors = tuple[torch.Tensor, ...]

_whole: contextvars.ContextVar[bool] = contextvars.ContextVar("hopkit.loops", default=False)


class Unstructured(Exception):
    """What is to be decided, or one of the ways, is no graph of tensors."""


@contextlib.contextmanager
def loops_stay() -> Iterator[None]:
    """Inside, a loop is one node also where the number of its trips is known."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def loops_are_whole() -> bool:
    """Whether `loops_stay` is around this."""
    return _whole.get()


def compiling() -> bool:
    """Whether Inductor gets what is recorded now, and no transform of torch.func is around it."""
    return inductor.compiling() and levels.top() is None


def unknown(value: object) -> bool:
    """Whether this is a tensor whose value only running tells."""
    if not isinstance(value, torch.Tensor):
        return False
    value = unfunctional(value)
    return isinstance(value, FakeTensor) and value.constant is None


def trace(run: Flat, values: Sequence[object], *, again: bool = False) -> GraphModule:
    """``run`` as a graph.

    Args:
        run: A function of tensors and numbers that gives tensors.
        values: What it is called with, or what is like it.
        again: Whether backward records its derivative, in a graph of its own.

    Raises:
        Unstructured: It cannot be recorded, or uses another tensor, or Inductor has no code for the derivative.
    """
    stage = Stage(values)
    try:
        with stage.open(rehearsal=False):
            fakes = [stage.fake(value).detach() if isinstance(value, torch.Tensor) else value for value in values]
            graph = make_fx(lambda *inputs: tuple(run(inputs)))(*fakes)
    except Exception as error:
        raise Unstructured(f"it cannot be recorded: {error}") from error
    for module in graph.modules():
        if not isinstance(module, GraphModule):
            continue
        if again and module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop):
            raise Unstructured("Inductor does not find the number of trips of a loop within another node (2.13, 2.14)")
        if again and draws(module):
            raise Unstructured("it draws random numbers, and would draw others in backward")
        for node in module.graph.find_nodes(op="get_attr"):
            value = attribute(module, node.target)
            if isinstance(value, torch.Tensor) and isinstance(unfunctional(value), FakeTensor):
                raise Unstructured("it uses a tensor that nobody saw")
    return graph


@contextlib.contextmanager
def _one_node() -> Iterator[None]:
    """Inside, torch's operator is a node, whoever looks on, and what Inductor makes of it keeps its inputs."""
    if compiling():
        inductor.keep_inputs()
    with below_autograd(), taken_whole():
        yield


def cond(decides: torch.Tensor, yes: GraphModule, no: GraphModule, inputs: Sequence[object]) -> Tensors:
    """``(yes if decides else no)(*inputs)``, below autograd."""
    with _one_node():
        return cast("Tensors", torch.ops.higher_order.cond(decides, yes, no, tuple(inputs)))


def while_loop(going: GraphModule, step: GraphModule, state: Sequence[object], captured: Sequence[object]) -> Tensors:
    """The last state, below autograd. Both graphs take the state and then what is captured."""
    with _one_node():
        return cast("Tensors", torch.ops.higher_order.while_loop(going, step, tuple(state), tuple(captured)))


def while_stacked(
    going: GraphModule, step: GraphModule, state: Sequence[object], captured: Sequence[object]
) -> Tensors:
    """As `while_loop`, for all states after a step, stacked. Without a step: the state, as a stack of one."""
    with _one_node():
        stacks = torch.ops.higher_order.while_loop_stack_output(going, step, tuple(state), tuple(captured))
    count = stacks[0].shape[0]
    if isinstance(count, torch.SymInt):
        # No output of a graph that forward ends in is this number (as WhileLoopAutogradOp.forward has it).
        pending = count.node.shape_env.pending_fresh_unbacked_symbols
        pending[:] = [symbol for symbol in pending if symbol is not count.node.expr and str(symbol) != str(count)]
        torch._check(count >= 1)
    return cast("Tensors", stacks)


def scan(step: GraphModule, carry: Sequence[object], xs: Sequence[torch.Tensor], captured: Sequence[object]) -> Tensors:
    """The last carry, and what every step gives besides, stacked; below autograd."""
    with _one_node():
        first, along, others = (list(map(_computed, values)) for values in (carry, xs, captured))
        return tuple(torch.ops.higher_order.scan(step, first, along, tuple(others)))


def _computed(value: object) -> object:
    """``value``; the operator does not take a constant of an exported program for a tensor of the recording."""
    if not isinstance(value, torch.Tensor) or isinstance(unfunctional(value), FakeTensor):
        return value
    return value.view_as(value)
