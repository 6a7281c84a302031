"""A derivative written by hand, on the autograd tape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

from hopkit._torch import trees
from hopkit._torch.autograd import Step, apply, below_autograd, dual, needs_gradient
from hopkit.call import Call
from hopkit.codec import Slot
from hopkit.errors import CaptureError, RuleError
from hopkit.layout import Slots, fill


def hand_written(rule: Any, call: Call) -> object:
    """``call``, with the forward and backward that ``rule`` gives. The rule sees the author's own arguments."""
    if dual(call.inputs):
        return call.run()
    if not needs_gradient(call.inputs):
        with below_autograd():
            return call()
    return apply(_HandWritten(rule, call), call.inputs)


class _HandWritten(Step):
    def __init__(self, rule: Any, call: Call) -> None:
        self._rule, self._call = rule, call
        self._saved: object = None
        self._tensors: list[int] = []

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        saved = Slots()

        def body(*args: object, **kwargs: object) -> object:
            result = self._rule.forward(*args, **kwargs)
            if not (isinstance(result, tuple) and len(result) == 2):
                raise self._wrong("forward", f"gave a {type(result).__qualname__}", "return `(out, saved)`")
            self._saved = saved.split(result[1])
            # An object of the rule's own may hold tensors: it counts as something that the rule computed.
            saved.inputs += [v for v in trees.leaves(self._saved) if not (isinstance(v, _CONSTANT) or callable(v))]
            self._tensors = [i for i, v in enumerate(trees.leaves(result[0])) if isinstance(v, torch.Tensor)]
            return result[0]

        outputs = cast("tuple[object, ...]", self._call.replace(inputs=inputs).run(body))
        return outputs, tuple(saved.inputs)

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        # The rule expects one gradient per tensor of its result; an operand among them is no output of the node.
        assert self._call.layout is not None
        known = dict(zip(self._call.layout.outputs, gradients, strict=True))
        result = self._rule.backward(fill(self._saved, saved), *map(known.get, self._tensors))
        found = list(result) if isinstance(result, Iterable) and not isinstance(result, torch.Tensor) else [result]
        for gradient in found:
            if not (gradient is None or isinstance(gradient, torch.Tensor)):
                raise self._wrong("backward", f"gave {gradient!r} for a gradient", "give a tensor or None for each")
        inputs, operands = self._call.inputs, self._operands()
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
        totals: list[torch.Tensor | None] = [None] * len(inputs)
        for i, gradient in zip([*operands, *captured], found, strict=True):
            totals[i] = _sum(totals[i], gradient)
        return totals

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


def _sum(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


_CONSTANT = (Slot, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
