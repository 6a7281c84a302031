"""A mode that a plugin brings, of each kind: one generic rule serves every op, those before it and those after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit.extend import Call, Decline, OpSpec, PluginError, Rule, hookimpl
from hopkit.extend.mode import DispatchKey, Mode, TorchDispatchMode
from hopkit.kit import fresh


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    with fresh():
        yield


Twice = hopkit.Op[[hopkit.Subgraph, Tensor], Tensor]


def define(name: str) -> Twice:
    @hopkit.define(name)
    def twice(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(body(x)) * 2

    return twice


def expected(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(f(x)) * 2


def bringing(entry: object, rule: Rule, name: str = "mine") -> SimpleNamespace:
    """A plugin that brings a mode, and one rule for it."""

    @hookimpl
    def hopkit_add_modes() -> list[Mode]:
        return [Mode(name, entry, gives="what the test says")]

    def hook(op: OpSpec) -> Rule:
        return rule

    return SimpleNamespace(hopkit_add_modes=hopkit_add_modes, **{f"hopkit_{name}_rule": hookimpl(hook)})


# A dispatch mode


class Log(TorchDispatchMode):
    """Sees ops whole, and what is not in one operator by operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.seen: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def log(active: Log, call: Call) -> object:
    active.seen.append(call.op.name)
    return call()


def test_without_a_rule_a_dispatch_mode_sees_the_inside() -> None:
    op, x = define("t_before"), torch.rand(3)
    with Log() as active:
        op(torch.sin, x)
    assert active.seen == ["aten.sin.default", "aten.sin.default", "aten.mul.Tensor"]


def test_a_dispatch_mode_sees_whole_every_op_defined_before_and_after() -> None:
    before, x = define("t_before"), torch.rand(3)
    hopkit.register(bringing(Log, log), "log")
    after = define("t_after")
    with Log() as active:
        results = [before(torch.sin, x), torch.cos(x), after(torch.sin, x)]
    assert active.seen == ["t_before", "aten.cos.default", "t_after"]
    for result, value in zip(results, [expected(torch.sin, x), torch.cos(x), expected(torch.sin, x)], strict=True):
        torch.testing.assert_close(result, value)


def test_gradients_pass_through_a_dispatch_mode_captures_included() -> None:
    op = define("t_before")
    hopkit.register(bringing(Log, log), "log")
    x, w = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    with Log() as active:
        result = op(lambda y: y.sin() * w, x)
    assert "t_before" in active.seen
    gradients = torch.autograd.grad(result.sum(), [x, w])
    wanted = torch.autograd.grad(expected(lambda y: y.sin() * w, x).sum(), [x, w])
    torch.testing.assert_close(gradients, wanted)


def test_a_mode_that_went_sees_the_inside_again() -> None:
    op, x = define("t_before"), torch.rand(3)
    hopkit.register(bringing(Log, log), "log")
    hopkit.unregister("log")
    with Log() as active:
        op(torch.sin, x)
    assert active.seen[0] == "aten.sin.default"


def test_a_rule_can_let_the_mode_see_the_inside() -> None:
    def inside(active: Log, call: Call) -> object:
        active.seen.append(call.op.name)
        with active:
            return call.run()

    op, x = define("t_before"), torch.rand(3)
    hopkit.register(bringing(Log, inside), "log")
    with Log() as active:
        result = op(torch.sin, x)
    torch.testing.assert_close(result, expected(torch.sin, x))
    assert active.seen == ["t_before", "aten.sin.default", "aten.sin.default", "aten.mul.Tensor"]


# A tensor class


class Boxed(torch.Tensor):
    """Holds a tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Boxed:
        box: Boxed = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )
        box.held = inner.detach()
        return box

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares it without its first argument
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        return box(func(*map(unbox, args), **(kwargs or {})))


def box(value: object) -> object:
    return Boxed(value) if isinstance(value, Tensor) else value


def unbox(value: object) -> object:
    return value.held if isinstance(value, Boxed) else value


whole: list[str] = []


def boxes(entry: type[Boxed], call: Call) -> object:
    assert entry is Boxed
    whole.append(call.op.name)
    outputs = call.replace(inputs=[unbox(value) for value in call.inputs])()
    assert isinstance(outputs, tuple)
    return tuple(map(box, outputs))


def test_a_tensor_class_takes_whole_every_op_defined_before_and_after() -> None:
    whole.clear()
    before, x = define("t_before"), torch.rand(3)
    hopkit.register(bringing(Boxed, boxes), "boxes")
    after = define("t_after")
    for op in (before, after):
        result = op(torch.sin, Boxed(x))
        assert isinstance(result, Boxed)
        torch.testing.assert_close(result.held, expected(torch.sin, x))
    assert whole == ["t_before", "t_after"]
    assert not isinstance(before(torch.sin, x), Boxed)


def test_gradients_pass_through_a_tensor_class() -> None:
    op, x = define("t_before"), torch.rand(3, requires_grad=True)
    hopkit.register(bringing(Boxed, boxes), "boxes")
    boxed = Boxed(x.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(op(torch.sin, boxed).sum(), boxed)
    (wanted,) = torch.autograd.grad(expected(torch.sin, x).sum(), x)
    torch.testing.assert_close(unbox(gradient), wanted)


def test_a_tensor_class_without_a_rule_sees_the_inside() -> None:
    whole.clear()
    x = torch.rand(3)
    result = define("t_before")(torch.sin, Boxed(x))
    assert isinstance(result, Boxed)
    torch.testing.assert_close(result.held, expected(torch.sin, x))
    assert not whole


# A tensor class, with rules in place of the body


def in_place(rule: Rule) -> SimpleNamespace:
    """A plugin whose mode for `Boxed` has ``rule`` in place of every body."""
    plugin = bringing(Boxed, rule, "boxes")
    plugin.hopkit_add_modes = hookimpl(lambda: [Mode("boxes", Boxed, gives="what the test says", in_place=True)])
    return plugin


def negated(entry: type[Boxed], body: Callable[[object], object], x: Boxed) -> object:
    whole.append(type(x).__name__)
    return -body(x)  # type: ignore[operator] # a tensor


def test_a_rule_takes_the_place_of_the_body_for_tensors_of_its_class_alone() -> None:
    whole.clear()
    before, x = define("t_before"), torch.rand(3)
    hopkit.register(in_place(negated), "boxes")
    after = define("t_after")
    for op in (before, after):
        torch.testing.assert_close(unbox(op(torch.sin, Boxed(x))), -x.sin())
        torch.testing.assert_close(op(torch.sin, x), expected(torch.sin, x))
    assert whole == ["Boxed", "Boxed"]


def test_a_rule_in_place_of_the_body_is_on_the_tape_and_has_the_author_s_callable() -> None:
    op = define("t_before")
    hopkit.register(in_place(negated), "boxes")
    x = torch.rand(3)
    boxed = Boxed(x).requires_grad_()
    (gradient,) = torch.autograd.grad(op(lambda y: y * y, boxed).sum(), boxed)
    torch.testing.assert_close(unbox(gradient), -2 * x)


def test_the_body_runs_where_a_rule_in_its_place_declines_or_the_op_vanishes() -> None:
    def declining(entry: type[Boxed], body: object, x: Boxed) -> object:
        raise Decline("not today")

    op, x = define("t_before"), torch.rand(3)
    hopkit.register(in_place(negated), "boxes")
    with hopkit.decompose(op):
        torch.testing.assert_close(unbox(op(torch.sin, Boxed(x))), expected(torch.sin, x))
    hopkit.unregister("boxes")
    hopkit.register(in_place(declining), "boxes")
    torch.testing.assert_close(unbox(op(torch.sin, Boxed(x))), expected(torch.sin, x))


def test_a_rule_in_place_of_the_body_takes_what_the_body_takes() -> None:
    define("t_before")
    with pytest.raises(PluginError, match=r"takes \(entry, call\).*\(entry, body: Subgraph, x: Tensor\)"):
        hopkit.register(in_place(lambda entry, call: call()), "boxes")


def test_only_a_tensor_class_has_rules_in_place_of_the_body() -> None:
    plugin = SimpleNamespace(hopkit_add_modes=hookimpl(lambda: [Mode("log", Log, gives="...", in_place=True)]))
    with pytest.raises(PluginError, match=r"Give it a subclass of torch\.Tensor"):
        hopkit.register(plugin, "mine")


# A dispatch key


def dense(entry: DispatchKey, call: Call) -> object:
    """Ops on sparse tensors, by way of dense ones."""
    whole.append(f"{entry.name} {call.op.name}")
    inputs = [value.to_dense() if isinstance(value, Tensor) else value for value in call.inputs]
    outputs = call.replace(inputs=inputs)()
    assert isinstance(outputs, tuple)
    return tuple(output.to_sparse() for output in outputs)


def test_a_backend_takes_whole_every_op_defined_before_and_after() -> None:
    whole.clear()
    before, x = define("t_before"), torch.eye(3)
    hopkit.register(bringing(DispatchKey.SparseCPU, dense), "dense")
    after = define("t_after")
    for op in (before, after):
        result = op(torch.sin, x.to_sparse())
        assert result.is_sparse
        torch.testing.assert_close(result.to_dense(), expected(torch.sin, x))
    assert whole == ["SparseCPU t_before", "SparseCPU t_after"]
    torch.testing.assert_close(before(torch.sin, x), expected(torch.sin, x))


def test_gradients_pass_through_a_backend() -> None:
    def triple(y: Tensor) -> Tensor:  # torch has few derivatives on sparse tensors
        return y * 3

    op, x = define("t_before"), torch.eye(3).to_sparse().requires_grad_()
    (wanted,) = torch.autograd.grad(expected(triple, x).to_dense().sum(), x)
    hopkit.register(bringing(DispatchKey.SparseCPU, dense), "dense")
    (gradient,) = torch.autograd.grad(op(triple, x).to_dense().sum(), x)
    torch.testing.assert_close(gradient.to_dense(), wanted.to_dense())


# Two plugins, and mistakes


def test_one_plugin_brings_the_mode_and_another_serves_it() -> None:
    op, x = define("t_before"), torch.rand(3)
    hopkit.register(SimpleNamespace(hopkit_add_modes=bringing(Log, log).hopkit_add_modes), "bringer")
    hopkit.register(SimpleNamespace(hopkit_mine_rule=bringing(Log, log).hopkit_mine_rule), "server")
    with Log() as active:
        op(torch.sin, x)
    assert active.seen == ["t_before"]


def test_an_author_can_answer_in_a_mode_that_a_plugin_brought() -> None:
    op, x = define("t_before"), torch.rand(3)
    hopkit.register(bringing(Log, log), "log")

    @op.rule("mine")
    def mine(active: Log, call: Call) -> object:
        active.seen.append("the author's")
        return call()

    with Log() as active:
        op(torch.sin, x)
    assert active.seen == ["the author's"]


def test_the_listing_names_the_modes_that_a_plugin_brings() -> None:
    hopkit.register(bringing(Log, log), "log")
    (info,) = [info for info in hopkit.plugins() if info.name == "log"]
    assert info.modes == ("mine",)
    assert info.hooks == ("hopkit_add_modes", "hopkit_mine_rule")


class Plain(torch.Tensor):
    """No ``__torch_dispatch__``: torch never asks for it."""


@pytest.mark.parametrize("entry", ["SparseCPU", int, Plain, None], ids=repr)
def test_an_entry_that_torch_cannot_ask_for_is_refused(entry: object) -> None:
    with pytest.raises(PluginError, match="plugin 'mine', hook 'hopkit_add_modes' gave Mode"):
        hopkit.register(bringing(entry, log), "mine")
    assert "mine" not in [info.name for info in hopkit.plugins()]


@pytest.mark.parametrize(("entry", "name"), [(Log, "fake"), (Log, "vmap")])
def test_a_name_that_is_taken_is_refused(entry: object, name: str) -> None:
    with pytest.raises(PluginError, match=f"brings the mode '{name}'.*which is there already"):
        hopkit.register(bringing(entry, log, name), "mine")


def test_an_entry_that_is_taken_is_refused() -> None:
    hopkit.register(bringing(Log, log, "first"), "first")
    with pytest.raises(PluginError, match="brings the mode 'second'"):
        hopkit.register(bringing(Log, log, "second"), "second")


def test_a_rule_that_takes_something_else_is_refused_and_the_mode_goes_with_it() -> None:
    define("t_before")
    with pytest.raises(PluginError, match=r"plugin 'mine', hook 'hopkit_mine_rule'.*takes \(call\).*\(entry, call\)"):
        hopkit.register(bringing(Log, lambda call: call()), "mine")
    hopkit.register(bringing(Log, log), "mine")
