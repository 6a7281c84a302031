"""A derivative written by hand, on the autograd tape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch

from hopkit._torch import trees
from hopkit._torch.autograd import Step, apply, below_autograd, dual, needs_gradient, unhooked
from hopkit.call import Call
from hopkit.codec import Slot
from hopkit.errors import CaptureError, RuleError
from hopkit.layout import Slots, fill
from hopkit.transform import NOTHING, Flat, of_inputs, vmap


def hand_written(rule: Any, call: Call) -> object:
    """``call``, with the forward and backward that ``rule`` gives. The rule sees the author's own arguments."""
    if dual(call.inputs):
        return call.run()
    if not needs_gradient(call.inputs):
        with below_autograd():
            return call()
    return apply(_HandWritten(rule, call), call.inputs)


class _HandWritten(Step):
    """The pair as one step of the tape; under `torch.vmap`, the pair for one item, batched."""

    def __init__(self, rule: Any, call: Call) -> None:
        self._rule, self._inputs = rule, call.inputs
        self._levels, self._call = call.batches or (), call.item
        self._saved: object = None
        self._tensors: list[int] = []
        self._places: list[tuple[str, int]] = []
        self._shapes: list[torch.Size | None] = []
        self._wrt: list[int] = []

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        run: Flat = self._forward
        for dims, randomness in self._levels:
            run = vmap(run, dims, randomness)
        found = run(inputs)
        made = sum(kind == _MADE for kind, _ in self._places)
        known = {_INPUT: inputs, _OUTPUT: found[: len(found) - made] or NOTHING, _MADE: found[len(found) - made :]}
        return known[_OUTPUT], tuple(known[kind][i] for kind, i in self._places)

    def _forward(self, inputs: Sequence[object]) -> tuple[object, ...]:
        """The outputs, and then what is saved besides them and the inputs."""
        saved = Slots()

        def body(*args: object, **kwargs: object) -> object:
            result = self._rule.forward(*args, **kwargs)
            if not (isinstance(result, tuple) and len(result) == 2):
                raise self._wrong("forward", f"gave a {type(result).__qualname__}", "return `(out, saved)`")
            self._saved = saved.split(result[1])
            # An object of the rule's own may hold tensors: it counts as something that the rule computed.
            objects = [v for v in trees.leaves(self._saved) if not (isinstance(v, _CONSTANT) or callable(v))]
            if objects and self._levels:
                raise self._wrong("forward", f"saved {objects[0]!r} under torch.vmap", "save tensors and numbers alone")
            saved.inputs += objects
            self._tensors = [i for i, v in enumerate(trees.leaves(result[0])) if isinstance(v, torch.Tensor)]
            return result[0]

        outputs = cast("tuple[object, ...]", self._call.replace(inputs=inputs).run(body))
        known = {id(v): (_OUTPUT, i) for i, v in enumerate(outputs)} | {
            id(v): (_INPUT, i) for i, v in enumerate(inputs)
        }
        made = [v for v in saved.inputs if id(v) not in known]
        known |= {id(v): (_MADE, i) for i, v in enumerate(made)}
        self._places = [known[id(v)] for v in saved.inputs]
        self._shapes = [v.shape if isinstance(v, torch.Tensor) else None for v in inputs]
        return (*(() if outputs is NOTHING else outputs), *made) or NOTHING  # a batch is of tensors

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        given = [i for i, gradient in enumerate(gradients) if gradient is not None]
        run: Callable[[Sequence[object]], Sequence[torch.Tensor]]
        run = functools.partial(self._backward, len(gradients), given)
        for dims, randomness in self._levels:
            run = functools.partial(self._batched, run, dims, randomness)
        found = iter(run([*saved, *(gradients[i] for i in given)]))
        return [next(found) if i in self._wrt else None for i in range(len(self._inputs))]

    def _batched(
        self,
        run: Callable[[Sequence[object]], Sequence[torch.Tensor]],
        dims: Sequence[int | None],
        randomness: str,
        values: Sequence[object],
    ) -> Sequence[torch.Tensor]:
        """``run`` for every item."""
        taken = [dims[i] if kind == _INPUT else 0 for kind, i in self._places]
        taken += [0] * (len(values) - len(taken))
        found = torch.vmap(lambda *values: tuple(run(values)), in_dims=tuple(taken), randomness=randomness)(*values)
        return of_inputs(found, [dims[i] for i in self._wrt])

    def _backward(self, count: int, given: Sequence[int], values: Sequence[object]) -> list[torch.Tensor]:
        """The gradients of those inputs that have one, which are then known by number."""
        saved, gradients = values[: len(self._places)], dict(zip(given, values[len(self._places) :], strict=True))
        # The rule expects one gradient per tensor of its result; an operand among them is no output of the node.
        assert self._call.layout is not None
        known = dict(zip(self._call.layout.outputs, map(gradients.get, range(count)), strict=True))
        with unhooked():  # it may use torch.func, which works in no checkpoint
            result = self._rule.backward(fill(self._saved, saved), *map(known.get, self._tensors))
        found = list(result) if isinstance(result, Iterable) and not isinstance(result, torch.Tensor) else [result]
        for gradient in found:
            if not (gradient is None or isinstance(gradient, torch.Tensor)):
                raise self._wrong("backward", f"gave {gradient!r} for a gradient", "give a tensor or None for each")
        inputs, operands = self._inputs, self._operands()
        captured = list(range(self._call.operands, len(inputs)))
        if len(found) == len(operands):
            lost = [i for i in captured if getattr(inputs[i], "requires_grad", False)]
            if lost:
                raise CaptureError(
                    f"op '{self._call.op.name}'",
                    f"has a backward that gives no gradient for {self._call.name_of(lost[0])}",
                    why="the gradient would be lost without a word",
                    todo="Give one gradient per operand and then one per captured tensor (`subgraph.captures`), "
                    "or pass the tensor as an operand",
                )
            captured = []
        if len(found) != len(operands) + len(captured):
            wanted = f"return {len(operands)}: one per operand tensor"
            raise self._wrong("backward", f"gave {len(found)} gradients", wanted)
        totals: dict[int, torch.Tensor] = {}
        for i, gradient in zip([*operands, *captured], found, strict=True):
            if gradient is not None:
                totals[i] = totals[i] + gradient if i in totals else gradient
        self._wrt = sorted(totals)
        return [self._sized(i, totals[i]) for i in self._wrt]

    def _sized(self, i: int, gradient: torch.Tensor) -> torch.Tensor:
        """Of an item, what autograd does itself with the gradient of a tensor that was broadcast."""
        shape = self._shapes[i]
        if not self._levels or shape is None or gradient.shape == shape:
            return gradient
        return gradient.sum_to_size(shape)

    def _operands(self) -> list[int]:
        """For every operand tensor, the input that it is: one tensor may be passed for two operands."""
        assert self._call.layout is not None
        leaves = trees.leaves(dict(self._call.layout.values))
        return [leaf.index for leaf in leaves if isinstance(leaf, Slot)]

    def _wrong(self, function: str, found: str, todo: str) -> RuleError:
        return RuleError(
            f"the autograd rule of op '{self._call.op.name}'",
            f"{function} {found}",
            why="autograd needs one gradient per input",
            todo=f"Let it {todo}",
        )


_INPUT, _OUTPUT, _MADE = "input", "output", "made"
"""What is saved."""

_CONSTANT = (Slot, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
