"""Autograd's side of an op: below it, around it, and errors that wait for backward."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NoReturn, Protocol, cast

import torch
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx, _SingleLevelFunction

from hopkit._torch import levels, trees
from hopkit._torch.state import functionalizing, recording

_lowered: contextvars.ContextVar[bool] = contextvars.ContextVar("hopkit.lowered", default=False)


def below_autograd() -> contextlib.AbstractContextManager[None]:
    """Inside, operators enter torch's dispatcher under the autograd keys; for torch.func, under the level at hand."""
    if _lowered.get():
        return contextlib.nullcontext()
    return cast("contextlib.AbstractContextManager[None]", torch._C._AutoDispatchBelowAutograd())


@contextlib.contextmanager
def level_is_off(below: bool) -> Iterator[None]:
    """Inside, `below_autograd` has nothing to do (or, again, something): a level of torch.func is off already."""
    token = _lowered.set(below)
    try:
        yield
    finally:
        _lowered.reset(token)


def dual(values: Sequence[object]) -> bool:
    """Whether one of these tensors has a tangent."""
    # Dynamo's graph enters them without telling Python. To ask is no matter of one thread: not where nothing records.
    around = forward_ad._current_level >= 0 or ((recording() or functionalizing()) and levels.has_duals())
    return around and any(levels.has_tangent(value) or levels.may_have_tangent(value) for value in values)


def needs_gradient(values: Sequence[object]) -> bool:
    """Whether gradients are recorded, and one of these tensors asks for one."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*values)


def versions(values: Sequence[object]) -> list[int]:
    """How often each of these tensors was written to, also inside a transform. Of inference tensors nobody knows."""
    tensors = (levels.base(value) for value in values if isinstance(value, torch.Tensor))
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def differentiable(value: object) -> bool:
    """Whether this is a tensor of a dtype that has gradients."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def tied(outputs: object, sources: Sequence[object]) -> object:
    """``outputs``, stand-ins that were made from nothing, with gradients that reach all of ``sources``."""
    inside = levels.top() is not None or forward_ad._current_level >= 0  # there a derivative may be by any of them
    links = [
        s.abs().sum()
        for s in sources
        if isinstance(s, torch.Tensor) and (needs_gradient([s]) or (inside and differentiable(s)))
    ]
    if not links:
        return outputs

    def tie(output: torch.Tensor) -> torch.Tensor:
        return output + torch.stack([link.to(output.device, output.dtype) for link in links]).sum()

    return trees.map_only(torch.Tensor, lambda t: tie(t) if differentiable(t) else t, outputs)


class Step(Protocol):
    """One differentiable step: what `apply` puts on the autograd tape.

    Attributes:
        repeats: Whether ``backward``, where gradients are on, can be differentiated whatever ``forward`` saved.
    """

    repeats: bool = False

    @property
    def constant(self) -> Container[int]:
        """The outputs that have no gradient, besides those of dtypes that have none."""
        return ()

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """``(outputs, saved)``; gradients are off."""

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        """The gradients of the inputs."""


class _Context(FunctionCtx):
    step: Step
    numbers: dict[int, object]
    kept: int
    computed: bool
    saved_tensors: tuple[torch.Tensor, ...]


class _OnTape:
    @staticmethod
    def forward(ctx: _Context, step: Step, *inputs: object) -> tuple[object, ...]:
        outputs, saved = step.forward(inputs)
        known = {id(v) for v in (*inputs, *outputs)}
        tensors = [v for v in saved if isinstance(v, torch.Tensor)]
        ctx.step, ctx.kept = step, len(tensors)
        ctx.numbers = {i: v for i, v in enumerate(saved) if not isinstance(v, torch.Tensor)}
        ctx.computed = not step.repeats and any(id(v) not in known and not isinstance(v, _NUMBERS) for v in saved)
        ctx.save_for_backward(*tensors, *(_differentiated(inputs) if ctx.computed else ()))
        given, constant = {i: o for i, o in enumerate(outputs) if isinstance(o, torch.Tensor)}, step.constant
        ctx.mark_non_differentiable(*(o for i, o in given.items() if i in constant or not differentiable(o)))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # Once: checkpointing computes them when they are asked for. A level of torch.func may be over by now.
        unpacked = unwrap_dead_wrappers(ctx.saved_tensors)
        tensors = iter(unpacked[: ctx.kept])
        saved = tuple(ctx.numbers[i] if i in ctx.numbers else next(tensors) for i in range(ctx.kept + len(ctx.numbers)))
        if not (ctx.computed and torch.is_grad_enabled()):
            return (None, *ctx.step.backward(saved, gradients))
        # What a rule computed and saved has no history: a second derivative through it would be wrong without a word.
        behind: list[object] = [*unpacked[ctx.kept :], *gradients]
        if levels.gradients() is not None:  # the other levels have one
            found = ctx.step.backward(saved, gradients)
            return (None, *cast("tuple[torch.Tensor, ...]", apply(_Last(len(found)), [*found, *behind])))
        with torch.no_grad():
            found = ctx.step.backward(saved, gradients)
        if levels.top() is None:
            return (None, *cast("tuple[torch.Tensor, ...]", apply(_Last(len(found)), [*found, *behind])))
        if levels.differentiating() or any(
            isinstance(v, torch.Tensor) and levels.base(v).requires_grad for v in behind
        ):
            raise RuntimeError(_NOT_TWICE)
        return (None, *found)


class _Tape(_OnTape, torch.autograd.Function):
    pass


class _TapeOfLevel(_OnTape, _SingleLevelFunction):
    """torch.func has a tape for each of its levels."""


class _AtLevel:
    """A step as a level of torch.func has it: what it does is done below."""

    def __init__(self, step: Step, level: levels.Gradients) -> None:
        self._step, self._level = step, level
        self.constant, self.repeats, self.backward = step.constant, step.repeats, step.backward

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        values = tuple(map(self._level.unwrap, inputs))
        with self._level.lower(), level_is_off(True):
            outputs, saved = self._step.forward(values)
        wrapped = {id(value): (value, above) for value, above in zip(values, inputs, strict=True)}

        def wrap(value: object) -> object:
            if id(value) not in wrapped:
                wrapped[id(value)] = (value, self._level.wrap(value))
            return wrapped[id(value)][1]

        return tuple(map(wrap, outputs)), tuple(map(wrap, saved))


class _Last(Step):
    """Tensors that depend on others in a way that nobody can differentiate. (torch's ``once_differentiable`` leaves the
    dependence out, so that a second derivative with another part is that part alone.)
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        first = inputs[: self._count]
        return tuple(value.view_as(value) if isinstance(value, torch.Tensor) else value for value in first), ()

    def backward(self, *_: object) -> NoReturn:
        raise RuntimeError(_NOT_TWICE)


_NOT_TWICE = (
    "a hand-written backward cannot be differentiated: its forward saved what is neither an input nor an output"
)


_NUMBERS = (bool, int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)


def _differentiated(values: Sequence[object]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]


def apply(step: Step, inputs: Sequence[object]) -> tuple[object, ...]:
    """Run ``step`` on the autograd tape, that of the innermost transform if torch.func differentiates."""
    level = levels.gradients()
    if level is None:
        return cast("tuple[object, ...]", _Tape.apply(step, *inputs))  # type: ignore[no-untyped-call] # torch's own
    with enable_single_level_autograd_function():
        tape = cast("type[torch.autograd.Function]", _TapeOfLevel)  # for its types: it has the same methods
        return cast("tuple[object, ...]", tape.apply(_AtLevel(step, level), *inputs))


class _Apart(Step):
    """Tensors that look like its inputs, and are no views."""

    def __init__(self, inputs: Sequence[object]) -> None:
        self._constant = [i for i, value in enumerate(inputs) if not needs_gradient([value])]

    @property
    def constant(self) -> Container[int]:
        return self._constant

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        known = {id(value): _like(value) for value in inputs}
        return tuple(known[id(value)] for value in inputs), ()

    def backward(
        self, _: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        return gradients


def _like(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def apart(outputs: object) -> tuple[object, ...]:
    """What stands for these outputs of a node where they are views of what was computed inside: it shows no view."""
    values = trees.leaves(outputs)
    return apply(_Apart(values), values)


def passed_on(run: Callable[[Sequence[object]], object], inputs: Sequence[object]) -> object:
    """What ``run`` gives below the innermost level of torch.func, which has no gradient to record."""
    level = levels.gradients()
    assert level is not None
    values = tuple(map(level.unwrap, inputs))
    with level.lower(), level_is_off(False):
        outputs = run(values)
    return trees.map_only(torch.Tensor, level.wrap, outputs)


@contextlib.contextmanager
def unhooked() -> Iterator[None]:
    """Inside, what autograd saves is nobody else's business: checkpointing counts what is saved, and gives it back."""
    hooks: list[tuple[Callable[..., object], Callable[..., object]]] = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def every_level(jvp: Callable[..., object]) -> Callable[..., object]:
    """The ``jvp`` of a ``torch.autograd.Function``, where levels of forward mode are nested too.

    torch turns all of them off in it, also those around the one that asks: ``jacfwd(jacfwd(f))`` would be zero.

    Args:
        jvp: ``jvp(ctx, saved, *tangents)``, with the tensors that were saved for it.
    """

    def run(ctx: FunctionCtx, *tangents: object) -> object:
        saved = cast("_Context", ctx).saved_tensors
        primal = [levels.without_tangent(value) for value in (*saved, *tangents)]
        with forward_ad._set_fwd_grad_enabled(True), unhooked():  # it may use torch.func, which works in no checkpoint
            found = jvp(ctx, primal[: len(saved)], *primal[len(saved) :])
        return trees.map_leaves(levels.without_tangent, found)  # of what ``jvp`` closes over

    return run


def computed(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf as if it had been computed: it may be written to, and a backward does not get past it."""
    return _PAST_INPUTS(tensor)


_PAST_INPUTS = torch._C._functions.DelayedError("a backward inside a subgraph goes on to what its inputs came from", 1)


NOT_IMPLEMENTED = "Autograd not implemented for {}"


def raise_in_backward(op: str) -> Callable[[object], object]:
    """A function of an op's outputs: it replaces every floating-point tensor by one whose backward raises.

    As ``autograd_not_implemented`` with a deferred error does, in its words (torch/_higher_order_ops/utils.py).
    """
    error = torch._C._functions.DelayedError(NOT_IMPLEMENTED.format(op), 1)

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return error(tensor.requires_grad_() if differentiable(tensor) else tensor)

    return functools.partial(trees.map_tensors, mark)
