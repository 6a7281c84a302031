"""autograd: the op forward, and the op under vjp backward; where AOTAutograd records, the two halves of its derivative.

In plain eager no rule is asked: ordinary autograd sees the body. Where the op is recorded, or has a kernel of its own,
the tape holds one step: forward is the op below autograd, backward is the op whose body is vjp(body), which is itself
differentiated the same way. It computes the forward again, for a recorded op gives its outputs and nothing else.

AOTAutograd records forward and backward together, and there the step is divided otherwise: hopkit traces what the op
computes and its derivative as one graph, lets torch's partitioner cut it, and records a node of the op for each half.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Sequence
from typing import NoReturn, cast

import torch

from hopkit.extend import AutogradError, Call, OpSpec, Rule, hookimpl
from hopkit.extend.autograd import (
    Halves,
    OutsideError,
    Step,
    Unstructured,
    apart,
    apply,
    below_autograd,
    compiling,
    differentiable,
    dual,
    foreseeing,
    needs_gradient,
    no_gradient,
    raise_in_backward,
    raises_when_run,
    recording_ahead,
    repeatable,
    uncounted,
    versions,
)


@hookimpl
def hopkit_autograd_rule(op: OpSpec) -> Rule:
    """By the op's policy."""
    return {"derive": derive, "deferred_error": deferred_error, "error": error}[op.autograd]


def derive(call: Call) -> object:
    """Differentiate the body."""
    if dual(call.inputs):
        return call.run()
    if not needs_gradient(call.inputs):
        return below(call)
    if call.written:
        return copied(call)
    if foreseeing() and divisible(call):
        return apart(call.run())
    if recording_ahead() and divisible(call):
        try:
            return apply(Divided(call), call.inputs)
        except OutsideError:
            return call.run()  # autograd sees the body instead
    hidden = "" if call.layout is None else call.unseen
    draws = bool(hidden) and not call.lost  # and nothing else is the matter
    decides = call.op.outputs is not None and call.layout is not None
    if decides and not call.whole and (draws or not hidden) and compiling():
        with contextlib.suppress(Unstructured):
            return call.inlined(call.run)  # each of its steps has a derivative that Inductor knows
    if decides and draws and repeatable():
        with uncounted():
            return apply(Drawn(call), call.inputs)
    if hidden and (call.op.outputs is not None or call.op.effectful):
        raise AutogradError(
            f"op '{call.op.name}'",
            f"cannot be recorded for training: {hidden}",
            why="backward would run the body again, and its body cannot be recorded in its place",
            todo='Write its derivative (`@op.rule("autograd")`), or record it under torch.no_grad()',
        )
    if hidden and torch.compiler.is_exporting():  # its node is there already
        return apply(Untold(call, hidden), call.inputs)
    if call.layout is None or (hidden and not call.by_hand):
        return call.run()  # autograd sees the body instead
    with uncounted():  # a checkpoint may be computed again after the recording, and then it is the body that saves
        return apply(Derived(call), call.inputs)


def copied(call: Call) -> object:
    """Differentiate the op without mutation; what it writes to then holds what it gives.

    Backward needs what was there before, and so a copy of it.
    """
    if call.entangled:
        return call.run()
    inputs = list(call.inputs)
    for i in call.written:
        inputs[i] = cast("torch.Tensor", inputs[i]).clone()
    return call.on_copies(lambda pure: derive(pure.replace(inputs=inputs)), torch.Tensor.copy_)


def divisible(call: Call) -> bool:
    """Whether the op may become two halves: it can be traced, and nobody's kernel has to see the op itself."""
    settled = call.op.pure and call.op.outputs is None and not call.op.effectful
    return call.layout is not None and settled and not call.whole


class Derived(Step):
    """The op as one step of the tape."""

    repeats = True

    def __init__(self, call: Call) -> None:
        self._call = call

    @property
    def constant(self) -> Container[int]:
        """Otherwise every output would ask for a gradient, and some depend on no input that does."""
        return [i for i, reached in enumerate(self._call.rehearsal.sources or ()) if not reached]

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """The op, below autograd. The inputs are saved; backward computes what else it needs."""
        outputs = below(self._call.replace(inputs=inputs))
        assert isinstance(outputs, tuple)
        return outputs, inputs

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        """The op under vjp, called with the saved inputs and the gradients that there are."""
        given = [i for i, gradient in enumerate(gradients) if gradient is not None]
        sources = self._call.rehearsal.sources
        reached = range(len(saved)) if sources is None else {source for i in given for source in sources[i]}
        wrt = [i for i, value in enumerate(self._call.inputs) if needs(value) and i in reached]
        results: list[torch.Tensor | None] = [None] * len(self._call.inputs)
        if not wrt:
            return results
        found = self._again(saved).vjp(wrt, given, [gradients[i] for i in given])()
        assert isinstance(found, tuple)
        for i, gradient in zip(wrt, found, strict=True):
            results[i] = gradient
        return results

    def _again(self, saved: tuple[object, ...]) -> Call:
        return self._call.replace(inputs=saved)


class Drawn(Derived):
    """The op as one step of the tape, where it draws random numbers: backward draws the same."""

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """The op, and the states of the generators before."""
        outputs = below(self._call.replace(inputs=inputs).drawing())
        assert isinstance(outputs, tuple)
        count = len(outputs) - len(self._call.random)
        return outputs[:count], (*inputs, *outputs[count:])

    def _again(self, saved: tuple[object, ...]) -> Call:
        return self._call.redrawn(saved)


class Untold(Derived):
    """The op as one step of the tape, where its node does not tell what its derivative is."""

    def __init__(self, call: Call, hidden: str) -> None:
        super().__init__(call)
        self._hidden = hidden

    def backward(self, *_: object) -> NoReturn:
        """Nothing: it raises."""
        raise AutogradError(
            f"op '{self._call.op.name}'",
            f"cannot be differentiated inside an exported program: {self._hidden}",
            why="its derivative would be that of its graph, which does not tell so",
            todo='Differentiate the code that is exported outside it, or write the derivative (`@op.rule("autograd")`)',
        )


class Deferred(Derived):
    """The op as one step of the tape, in a graph with its backward: that raises, and not who records it."""

    constant = ()

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        """Gradients that nobody gets to see."""
        given = [gradient for gradient in gradients if gradient is not None]
        name = self._call.op.name
        return [raises_when_run(name, cast("torch.Tensor", v), given) if needs(v) else None for v in saved]


class Divided(Derived):
    """The op as one step of the tape, in two halves: backward has what forward computed."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._halves = Halves(call)
        self._versions = versions(call.inputs)

    @property
    def constant(self) -> Container[int]:
        """As the joint graph tells."""
        return self._halves.constant

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """The forward half."""
        return self._halves.forward(inputs)

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        """The backward half. What it is made of has no history: a second derivative starts from the inputs again."""
        found = None if torch.is_grad_enabled() else self._halves.backward(saved, gradients)
        if found is None:
            return super().backward(self._unchanged_inputs(), gradients)
        gradient = iter(found)
        return [next(gradient) if needs(value) else None for value in self._call.inputs]

    def _unchanged_inputs(self) -> tuple[object, ...]:
        inputs = self._call.inputs
        changed = "an input was written to since" if versions(inputs) != self._versions else self._call.unseen
        if changed:
            raise AutogradError(
                f"op '{self._call.op.name}'",
                f"cannot be recorded with a second derivative: {changed}",
                why="the body would have to run again, and would give something else",
                todo="Record the body in its place, `hopkit.decompose(op)`",
            )
        return inputs


def needs(value: object) -> bool:
    """Whether backward must give this input's gradient."""
    return isinstance(value, torch.Tensor) and value.requires_grad and differentiable(value)


def below(call: Call) -> object:
    """The op, without autograd."""
    with below_autograd():
        return call()


def deferred_error(call: Call) -> object:
    """Outputs whose backward raises."""
    if dual(call.inputs):
        return call.run()
    if not needs_gradient(call.inputs):
        return below(call)
    if recording_ahead() and call.layout is not None and not call.written:
        return apply(Deferred(call), call.inputs)
    # What is written to is no output: it has its gradient, as in eager.
    return raise_in_backward(call.op.name)(call.run() if call.written else below(call))


def error(call: Call) -> object:
    """No call where a gradient would be asked for."""
    if not needs_gradient(call.inputs):
        return below(call)
    raise no_gradient(call.op.name)
