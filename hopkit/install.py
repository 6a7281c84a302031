"""From the rules that answer for an op to the kernels in torch's tables: one adapter per mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from hopkit._torch import functional, inductor, keys, levels, library, trees
from hopkit._torch.autograd import dual, level_is_off, needs_gradient, passed_on
from hopkit._torch.fakes import FakeMode, autograd_on, bound, in_mode, run_in_mode, transforms_on
from hopkit._torch.operator import DispatchMode, Kernel, Key
from hopkit._torch.structured import Unstructured
from hopkit._torch.tracing import ProxyMode, Tracer
from hopkit.authored import batched, pushed
from hopkit.call import Call, as_before
from hopkit.errors import RuleError, no_gradient
from hopkit.handwritten import hand_written
from hopkit.region import outline, outlined
from hopkit.rule import Answer, Decline, Place, Table, ask, takes_calls
from hopkit.spec import OpSpec

if TYPE_CHECKING:
    from hopkit.modes import Mode

Decode = Callable[..., Call]
Function = Callable[..., object]


def kernels(op: str, table: Table, modes: Sequence[Mode], decode: Decode) -> dict[Key, Kernel]:
    """The kernels of an op, by the key under which torch looks for them."""
    found: dict[Key, Kernel] = {}
    for mode in modes:
        answers = table.get(mode.name, ())
        if answers and mode.name not in _ELSEWHERE and not mode.in_place:
            found.update(_ADAPTERS.get(mode.name, _added)(op, mode, answers, decode))
    if table["jvp"][0].place is not Place.BUILTIN:
        for autograd, before in ((keys.AUTOGRAD, 0), (levels.GRAD, 1)):
            found[autograd] = _of_duals(op, found[autograd], before, table["jvp"], decode)
    if not lowered(table):
        for key in (keys.FUNCTIONALIZE, keys.PROXY):
            found[key] = _inlining(op, found[key], table["device"], decode)
    return found


def lowered(table: Table) -> bool:
    """Whether somebody tells Inductor what to make of the op's node."""
    return any(answer.place is not Place.BUILTIN for answer in table["inductor"])


def called_back(op: OpSpec) -> bool:
    """Whether compiled code has to call the body as it stands: it decides on values, or what it does is an effect."""
    return op.outputs is not None or op.effectful


def _inlining(op: str, kernel: Kernel, answers: Sequence[Answer], decode: Decode) -> Kernel:
    """As ``kernel``; but Inductor gets what the op's own kernel does, or a call of it, and no node."""

    def inlining(mode: DispatchMode, /, *args: object, **kwargs: object) -> object:
        if not inductor.compiling():
            return kernel(mode, *args, **kwargs)
        call = decode(*args, **kwargs)
        devices = {"", *(value.device.type for value in call.inputs if isinstance(value, torch.Tensor))}
        rules = _rules([answer for answer in answers if answer.device in devices])

        def here() -> object:
            with mode:
                return call.run(None if call.derivative else lambda *a, **k: ask(op, "device", rules, *a, **k))

        if called_back(call.op):
            try:
                return call.inlined(here)
            except Unstructured:
                return _call_back(mode, call)
        if outlined(call.op) and not call.whole:
            return (
                outline(Tracer(mode, call.inputs), call)
                if isinstance(mode, ProxyMode)
                else kernel(mode, *args, **kwargs)
            )
        return here()

    return inlining


def _call_back(mode: DispatchMode, call: Call) -> object:
    if inductor.packaging():
        raise RuleError(
            f"op '{call.op.name}'",
            "cannot be packaged by AOTInductor",
            why="its body decides on a tensor's value or has an effect, so it is Python that has to run it",
            todo='Give it code of its own (`@op.rule("inductor")`), or compile it with torch.compile',
        )

    if call.entangled:
        raise RuleError(
            f"op '{call.op.name}'",
            "writes to an operand that shares memory with another input, and compiled code calls it back",
            why="what it writes is copied back, and the other input would not see it",
            todo="Pass a copy of one of the two",
        )
    with mode:
        return call.on_copies(_called, torch.Tensor.copy_) if call.written else _called(call)


def _called(call: Call) -> object:
    keywords = call.keywords

    def run(inputs: Sequence[object]) -> Sequence[torch.Tensor]:
        return laid(call.target(*call.graphs, tuple(inputs), **keywords))

    def like(inputs: Sequence[object]) -> Sequence[torch.Tensor]:
        return laid(call.replace(inputs=inputs).like_body())

    def laid(outputs: object) -> Sequence[torch.Tensor]:
        # Compiled code relies on strides. Those of gradients, and of batches, nobody declares.
        return [t.contiguous() for t in trees.tensors(outputs)] if call.derivative else trees.tensors(outputs)

    return library.call(run, like, call.inputs, effect=call.op.effectful)


def _rules(answers: Sequence[Answer]) -> list[Function]:
    return [cast("Function", answer.rule) for answer in answers]


def _device(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    def kernel_for(device: str) -> Kernel:
        rules = _rules([a for a in answers if a.device in ("", device)])

        def kernel(*args: object, **kwargs: object) -> object:
            call = decode(*args, **kwargs)
            # A transform of the op is a transform of its body: a kernel written for the op is not its derivative.
            with autograd_on(), transforms_on():  # a body may differentiate something itself, or batch it
                return call.run(None if call.derivative else lambda *a, **k: ask(op, mode.name, rules, *a, **k))

        return kernel

    found: dict[Key, Kernel] = {key: kernel_for("") for key in keys.EVERY_DEVICE}
    found.update({keys.of_device(a.device): kernel_for(a.device) for a in answers if a.device})
    return found


def _fake(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    rules = _rules(answers)

    def kernel(fake_mode: FakeMode, /, *args: object, **kwargs: object) -> object:
        call = decode(*args, **kwargs)
        # A weight that a subgraph closes over may be real where the operands are fake.
        inputs = [in_mode(value, fake_mode) for value in call.inputs]
        call = call.replace(graphs=list(map(as_before, call.graphs)), inputs=inputs)
        return run_in_mode(lambda: bound(result(call), call.inputs), fake_mode)

    def result(call: Call) -> object:
        return call.run() if call.derivative and call.op.outputs is None else call.run(shapes)

    def shapes(*args: object, **kwargs: object) -> object:
        return ask(op, mode.name, rules, *args, **kwargs)

    # A meta tensor has a shape and no value, as a fake one does: no kernel is asked.
    return {keys.FAKE: kernel, keys.META: lambda *args, **kwargs: result(decode(*args, **kwargs))}


def _autograd(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    rules = [_on_calls(a.rule) for a in answers]
    policy = answers[0].place is Place.BUILTIN

    def kernel(*args: object, **kwargs: object) -> object:
        with level_is_off(False):
            return ask(op, mode.name, rules, decode(*args, **kwargs))

    def of_level(_: object, /, *args: object, **kwargs: object) -> object:
        call = decode(*args, **kwargs)
        if not needs_gradient(call.inputs) and not dual(call.inputs):
            return passed_on(lambda inputs: call.replace(inputs=inputs)(), call.inputs)
        if policy and call.op.autograd == "error":
            raise no_gradient(op)
        # The body has a derivative in torch.func, whatever the policy; and so has a call without a layout.
        if call.layout is None or (policy and call.op.autograd != "derive"):
            return call.run()
        return ask(op, mode.name, rules, call)

    return {keys.AUTOGRAD: kernel, levels.GRAD: of_level}


def _of_duals(op: str, kernel: Kernel, before: int, answers: Sequence[Answer], decode: Decode) -> Kernel:
    """As ``kernel``, for autograd; an author's jvp rule answers for dual numbers outside torch.func, too.

    Args:
        op: The op's name.
        kernel: Who answers otherwise.
        before: How many arguments come before the node's.
        answers: Those for jvp.
        decode: Gives the call.
    """
    rules = [_on_levels(a.rule, pushed) for a in answers if a.place is not Place.BUILTIN]
    rules.append(lambda _, call: call.run())

    def of_duals(*args: object, **kwargs: object) -> object:
        call = decode(*args[before:], **kwargs)
        if call.layout is None or not any(map(levels.has_tangent, call.inputs)):
            return kernel(*args, **kwargs)
        return ask(op, "jvp", rules, levels.Duals(), call)

    return of_duals


def _of_level(key: Key, level: Callable[..., object], adapt: Function) -> Callable[..., dict[Key, Kernel]]:
    """The adapter of a transform of torch.func: a call without a layout has its body run in the transform."""

    def adapter(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
        rules = [_on_levels(a.rule, adapt) for a in answers]

        def kernel(interpreter: object, /, *args: object, **kwargs: object) -> object:
            call = decode(*args, **kwargs)
            return call.run() if call.layout is None else ask(op, mode.name, rules, level(interpreter), call)

        return {key: kernel}

    return adapter


def _on_levels(rule: object, adapt: Function) -> Function:
    return cast("Function", rule if takes_calls(rule) else functools.partial(adapt, rule))


def _on_calls(rule: object) -> Function:
    if not hasattr(rule, "backward"):
        return cast("Function", rule)

    def on_call(call: Call) -> object:
        if call.batches is None:
            raise Decline("it is written for the op and batches of it, and this is another transform")
        if call.written:
            raise Decline("it does not say what gradient a tensor has that the op writes to")
        return hand_written(rule, call)

    return on_call


def _functionalize(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    rules = _rules(answers)
    return functional.kernels(
        lambda layer, /, *args, **kwargs: ask(op, mode.name, rules, layer, decode(*args, **kwargs))
    )


def _proxy(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    rules = _rules(answers)

    def kernel(proxy_mode: ProxyMode, /, *args: object, **kwargs: object) -> object:
        call = decode(*args, **kwargs)
        outputs = ask(op, mode.name, rules, Tracer(proxy_mode, call.inputs), call)
        if call.layout is not None and not isinstance(outputs, (tuple, list)):
            raise RuleError(
                f"op '{op}'",
                f"has a proxy rule that gave {outputs!r}",
                why="it would be taken for the outputs of the node",
                todo="Let it return what `hopkit.extend.proxy.node` gives",
            )
        return outputs

    return {keys.PROXY: kernel}


def _added(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    """A mode that a plugin brought: ``rule(entry, call)``, where the entry is the active mode, the class or the key."""
    rules = _rules(answers)
    entry = cast("Key", mode.entry)
    if keys.is_dispatch_mode(entry):
        return {entry: lambda active, /, *args, **kwargs: ask(op, mode.name, rules, active, decode(*args, **kwargs))}
    return {entry: lambda *args, **kwargs: ask(op, mode.name, rules, entry, decode(*args, **kwargs))}


_ELSEWHERE = ("dynamo", "inductor")
"""Modes that run no kernel: they ask the op (hopkit/op.py)."""

_ADAPTERS = {
    "device": _device,
    "fake": _fake,
    "autograd": _autograd,
    "vmap": _of_level(levels.VMAP, levels.Batch, batched),
    "jvp": _of_level(levels.JVP, levels.Tangents, pushed),
    "functionalize": _functionalize,
    "proxy": _proxy,
}
