"""From the rules that answer for an op to the kernels in torch's tables: one adapter per mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from hopkit._torch import functional, keys
from hopkit._torch.fakes import FakeMode, autograd_on, in_mode, run_in_mode
from hopkit._torch.operator import Kernel, Key
from hopkit._torch.tracing import ProxyMode, Tracer
from hopkit.call import Call
from hopkit.handwritten import hand_written
from hopkit.rule import Answer, Decline, Table, ask

if TYPE_CHECKING:
    from hopkit.modes import Mode

Decode = Callable[..., Call]
Function = Callable[..., object]


def kernels(op: str, table: Table, modes: Sequence[Mode], decode: Decode) -> dict[Key, Kernel]:
    """The kernels of an op, by the key under which torch looks for them."""
    found: dict[Key, Kernel] = {}
    for mode in modes:
        answers = table.get(mode.name, ())
        if answers:
            found.update(_ADAPTERS.get(mode.name, _added)(op, mode, answers, decode))
    return found


def _rules(answers: Sequence[Answer]) -> list[Function]:
    return [cast("Function", answer.rule) for answer in answers]


def _device(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    def kernel_for(device: str) -> Kernel:
        rules = _rules([a for a in answers if a.device in ("", device)])

        def kernel(*args: object, **kwargs: object) -> object:
            call = decode(*args, **kwargs)
            # A transform of the op is a transform of its body: a kernel written for the op is not its derivative.
            with autograd_on():  # a body may differentiate something itself
                return call.run(None if call.transformed else lambda *a, **k: ask(op, mode.name, rules, *a, **k))

        return kernel

    found: dict[Key, Kernel] = {key: kernel_for("") for key in keys.EVERY_DEVICE}
    found.update({keys.of_device(a.device): kernel_for(a.device) for a in answers if a.device})
    return found


def _fake(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    rules = _rules(answers)

    def kernel(fake_mode: FakeMode, /, *args: object, **kwargs: object) -> object:
        call = decode(*args, **kwargs)
        # A weight that a subgraph closes over may be real where the operands are fake.
        call = call.replace(inputs=[in_mode(value, fake_mode) for value in call.inputs])
        if call.transformed:
            return run_in_mode(call.run if call.op.outputs is None else call.like_inputs, fake_mode)
        return run_in_mode(lambda: call.run(shapes), fake_mode)

    def shapes(*args: object, **kwargs: object) -> object:
        return ask(op, mode.name, rules, *args, **kwargs)

    def meta(*args: object, **kwargs: object) -> object:
        call = decode(*args, **kwargs)
        return call.run(None if call.transformed else shapes)

    # A meta tensor has a shape and no value, as a fake one does: no kernel is asked.
    return {keys.FAKE: kernel, keys.META: meta}


def _autograd(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    rules = [_on_calls(a.rule) for a in answers]
    return {keys.AUTOGRAD: lambda *args, **kwargs: ask(op, mode.name, rules, decode(*args, **kwargs))}


def _on_calls(rule: object) -> Function:
    if not hasattr(rule, "backward"):
        return cast("Function", rule)

    def on_call(call: Call) -> object:
        if call.transformed:
            raise Decline("it is written for the op, and this is a transform of it")
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
        return ask(op, mode.name, rules, Tracer(proxy_mode, call.inputs), call)

    return {keys.PROXY: kernel}


def _added(op: str, mode: Mode, answers: Sequence[Answer], decode: Decode) -> dict[Key, Kernel]:
    """A mode that a plugin brought: ``rule(entry, call)``, where the entry is the active mode, the class or the key."""
    rules = _rules(answers)
    entry = cast("Key", mode.entry)
    if keys.is_dispatch_mode(entry):
        return {entry: lambda active, /, *args, **kwargs: ask(op, mode.name, rules, active, decode(*args, **kwargs))}
    return {entry: lambda *args, **kwargs: ask(op, mode.name, rules, entry, decode(*args, **kwargs))}


_ADAPTERS = {
    "device": _device,
    "fake": _fake,
    "autograd": _autograd,
    "functionalize": _functionalize,
    "proxy": _proxy,
}
