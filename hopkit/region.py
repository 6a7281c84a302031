"""A call that AOTAutograd records for training, as two: each is a node, with its part of the call's joint graph."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch

from hopkit._torch import inductor, partition, tracing, trees
from hopkit._torch.autograd import differentiable
from hopkit._torch.casts import casting
from hopkit._torch.fakes import Stage, outside_modes
from hopkit._torch.functional import frozen
from hopkit._torch.sizes import describe
from hopkit.call import Call, key_of
from hopkit.digest import REVISION
from hopkit.spec import OpSpec


class Halves:
    """What a call computes and its derivative, divided so that backward has what forward computed.

    Args:
        call: The call, while AOTAutograd records it.

    Raises:
        OutsideError: The derivative uses a tensor that is not among the call's inputs.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._decompositions = tracing.decompositions()
        self._key = (call.op.name, *map(key_of, call.graphs), str(call.keywords), *map(_input, call.inputs))
        self._expected = tracing.remembered(("outputs", self._key), self._outputs)
        self._cut = tracing.remembered(self._key, lambda: partition.cut(self._joint(self._expected)))

    def _outputs(self) -> Mapping[int, torch.Tensor]:
        """Stand-ins of the outputs that may have a gradient."""
        outputs = enumerate(trees.leaves(self._call.rehearsal.outputs))
        return {i: cast("torch.Tensor", output) for i, output in outputs if differentiable(output)}

    @property
    def constant(self) -> frozenset[int]:
        """The outputs that have no gradient."""
        return self._cut.joint.constant

    def forward(self, inputs: Sequence[object]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """The call's outputs, and what `backward` needs. What is written to an input later does not reach it."""
        values = self._cut.forward.run(functools.partial(self._run, "forward"), inputs)
        count = self._cut.joint.outputs
        return tuple(values[:count]), tuple(map(frozen, values[count:]))

    def backward(
        self, saved: Sequence[object], gradients: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None] | None:
        """The gradients of the inputs that require one. None: what was saved is not enough for these ``gradients``."""
        given = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        wanted: Sequence[int] = self._cut.given
        piece: partition.Piece | None = self._cut.backward
        if any(i not in given or _told(given[i]) != _told(self._expected[i]) for i in wanted):
            # A gradient that is not there is none of zeros: times an infinite derivative that would be nan.
            key, wanted = (*self._key, *given, *map(_told, given.values())), list(given)
            piece = tracing.remembered(key, lambda: partition.again(self._cut, self._joint(given)))
        if piece is None:
            return None
        found = piece.run(functools.partial(self._run, "backward"), [*saved, *(given[i] for i in wanted)])
        return cast("Sequence[torch.Tensor | None]", found)

    def _run(self, part: str, graph: Callable[..., object], inputs: Sequence[object]) -> object:
        with casting({}):
            return self._call.region(part, graph, inputs)()

    def _joint(self, gradients: Mapping[int, torch.Tensor]) -> partition.Joint:
        stage, inputs = Stage(self._call.inputs), self._call.inputs
        inside = _whole() if outlined(self._call.op) else contextlib.nullcontext()
        with stage.open(rehearsal=False), inside:
            fakes = [stage.fake(value) if isinstance(value, torch.Tensor) else value for value in inputs]
            given = {i: stage.fake(gradient).detach() for i, gradient in gradients.items()}

            def run(values: Sequence[object]) -> Sequence[object]:
                return cast("Sequence[object]", self._call.replace(inputs=values).run())

            return partition.trace(run, inputs, fakes, given, stage, self._decompositions)


_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("hopkit.region", default=False)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Inside, what a region is made of is recorded."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def outlined(op: OpSpec) -> bool:
    """Whether Inductor gets a call of a region, whose code it writes once, and no code in place.

    A region has none in it: a call inside one is part of it.
    """
    return op.outline and not _inside.get() and inductor.outlines()


def outline(tracer: tracing.Tracer, call: Call) -> object:
    """Record a call of a region: the graph of this call, which is traced once for all calls that are alike.

    Args:
        tracer: The graph that is being recorded.
        call: Below autograd and functionalization.
    """
    inductor.keep_inputs()
    # One code for all calls: Inductor, which changes the layout of what it computes, must not do so for some of them.
    call = call.replace(inputs=[tracer.settled(value, inductor.of_layout) for value in call.inputs])

    def run(*inputs: object) -> tuple[object, ...]:
        return tuple(trees.leaves(call.replace(inputs=inputs).run()))

    alike = ("region", call.op.name, *map(key_of, call.graphs), str(call.keywords), *map(_like, call.inputs))
    with outside_modes():
        examples = [value.detach() if isinstance(value, torch.Tensor) else value for value in call.inputs]
    with _whole():
        graph = tracer.trace(f"{call.op.name}_{call.part or 'region'}", run, examples, alike, gradients=False)
    name = tracer.register(call.op.name, graph)
    known = f"{name}-{REVISION}"  # what is in torch's cache is of the same hopkit
    return tracer.emit(
        torch.ops.higher_order.invoke_subgraph, (graph, known, *call.inputs), {}, tracer.like(graph) or call()
    )


def _input(value: object) -> object:
    """What a joint graph is traced for."""
    return _like(value), isinstance(value, torch.Tensor) and value.requires_grad


def _like(value: object) -> object:
    return _told(value) if isinstance(value, torch.Tensor) else describe(cast("int", value))


def _told(tensor: torch.Tensor) -> object:
    return tensor.dtype, tensor.device, *(tuple(map(describe, n)) for n in (tensor.shape, tensor.stride()))
