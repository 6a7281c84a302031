"""Who answers: author, plugin for this op, plugin for this mode, built-in; and what happens in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import hopkit
from hopkit.extend import Decline, Mode, OpSpec, PluginError, Rule, RuleConflictError, RuleError, hookimpl
from hopkit.extend.mode import TorchDispatchMode
from hopkit.kit import Kit, fresh


@pytest.fixture(autouse=True)
def host() -> Iterator[Kit]:
    with fresh() as host:
        yield host


@pytest.fixture
def op() -> hopkit.Op[[hopkit.Subgraph, Tensor], Tensor]:
    @hopkit.define("t_apply")
    def apply(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x)

    return apply


Apply = hopkit.Op[[hopkit.Subgraph, Tensor], Tensor]
X = torch.zeros(2)


def gives(value: float) -> Callable[[hopkit.Subgraph, Tensor], Tensor]:
    """A device rule that is told from others by what it gives."""
    return lambda body, x: torch.full_like(x, value)


def plugin(rule: object, *, op: str | tuple[str, ...] = (), overrides: str | tuple[str, ...] = ()) -> object:
    """A plugin whose device rule this is."""

    @hookimpl(op=op, overrides=overrides)
    def hopkit_device_rule(op: OpSpec) -> object:
        return rule

    return SimpleNamespace(hopkit_device_rule=hopkit_device_rule)


def answer(op: Apply, x: Tensor = X) -> float:
    return op(torch.sin, x).flatten()[0].item()


# The order


def test_author_then_plugin_for_the_op_then_plugin_for_the_mode_then_body(op: Apply) -> None:
    assert answer(op) == 0
    hopkit.register(plugin(gives(3)), "for the mode")
    assert answer(op) == 3
    hopkit.register(plugin(gives(2), op="t_apply"), "for the op")
    assert answer(op) == 2
    op.rule("device")(lambda body, x: torch.full_like(x, 1))
    assert answer(op) == 1


def test_each_mode_has_its_own_order(op: Apply) -> None:
    hopkit.register(plugin(gives(3)), "device")
    op.rule("fake")(lambda body, x: x.new_empty(7))
    places = {mode: [a.plugin for a in answers] for mode, answers in op.table.items()}
    assert places["device"] == ["device", "hopkit.rules.device"]
    assert places["fake"] == [__name__, "hopkit.rules.fake"]
    assert places["proxy"] == ["hopkit.rules.proxy"]


def test_what_is_for_one_device_comes_before_what_is_for_all_in_the_same_place(op: Apply) -> None:
    hopkit.register(plugin({"cpu": gives(2)}), "cpu")
    hopkit.register(plugin(gives(3)), "all")
    assert answer(op) == 2
    assert answer(op, torch.zeros(2, dtype=torch.float).to_sparse().to_dense()) == 2


def test_a_place_outweighs_a_device(op: Apply) -> None:
    hopkit.register(plugin({"cpu": gives(3)}), "for the mode, on cpu")
    hopkit.register(plugin(gives(2), op="t_apply"), "for the op, anywhere")
    assert answer(op) == 2


def test_a_rule_for_another_device_is_not_asked(op: Apply) -> None:
    op.rule("device", device="cuda")(lambda body, x: torch.full_like(x, 1))
    assert answer(op) == 0


def test_the_last_rule_that_an_author_attached_counts(op: Apply) -> None:
    for value in (1, 2):
        op.rule("device")(gives(value))
    assert answer(op) == 2


def test_a_plugin_can_answer_for_several_ops(op: Apply) -> None:
    hopkit.register(plugin(gives(2), op=("t_other", "t_apply")), "two ops")
    assert answer(op) == 2


def test_a_plugin_for_another_op_is_not_asked(op: Apply) -> None:
    def never(op: OpSpec) -> Rule:
        raise AssertionError("asked")

    hopkit.register(SimpleNamespace(hopkit_device_rule=hookimpl(op="t_other")(never)), "another")
    assert answer(op) == 0


# Declining


def test_a_rule_that_declines_leaves_the_call_to_the_next(op: Apply) -> None:
    @op.rule("device")
    def small(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        if x.numel() > 2:
            raise Decline("too large")
        return x + 1

    hopkit.register(plugin(gives(3)), "for the mode")
    assert answer(op) == 1
    assert answer(op, torch.zeros(5)) == 3


def test_a_plugin_without_an_answer_leaves_the_op_to_the_next(op: Apply) -> None:
    hopkit.register(plugin(None), "silent")
    assert answer(op) == 0
    assert [a.plugin for a in op.table["device"]] == ["hopkit.rules.device"]


def test_when_all_decline_the_error_has_every_reason(op: Apply) -> None:
    class Tiling(TorchDispatchMode):
        pass

    def too_small(entry: object, call: object) -> object:
        raise Decline("the tiles are too small")

    class Tiles:
        @hookimpl
        def hopkit_add_modes(self) -> list[Mode]:
            return [Mode("tile", Tiling, "tiles")]

        @hookimpl
        def hopkit_tile_rule(self, op: OpSpec) -> Rule:
            return too_small

    hopkit.register(Tiles(), "tiles")

    @op.rule("tile")
    def author(entry: object, call: object) -> object:
        raise Decline("not on Sundays")

    tiling = Tiling()  # type: ignore[no-untyped-call] # torch's own
    with tiling, pytest.raises(RuleError, match=r"t_apply.*tile.*not on Sundays; the tiles are too small"):
        op(torch.sin, X)


# Conflicts


def test_two_plugins_in_one_place_are_a_conflict_that_changes_nothing(op: Apply) -> None:
    hopkit.register(plugin(gives(2)), "first")
    before = hopkit.plugins()
    with pytest.raises(RuleConflictError, match=r"'first' and 'second'.*overrides='first'.*HOPKIT_BLOCK"):
        hopkit.register(plugin(gives(3)), "second")
    assert hopkit.plugins() == before
    assert answer(op) == 2


def test_different_places_and_devices_are_no_conflict(op: Apply) -> None:
    hopkit.register(plugin({"cuda": gives(2)}), "cuda")
    hopkit.register(plugin({"cpu": gives(3)}), "cpu")
    hopkit.register(plugin(gives(4), op="t_other"), "other")
    assert answer(op) == 3


@pytest.mark.parametrize("order", [("winner", "loser"), ("loser", "winner")])
def test_the_one_that_overrides_answers_whichever_came_first(op: Apply, order: tuple[str, str]) -> None:
    plugins = {"winner": plugin(gives(2), overrides="loser"), "loser": plugin(gives(3))}
    for name in order:
        hopkit.register(plugins[name], name)
    assert answer(op) == 2


def test_the_overridden_is_asked_when_the_other_declines(op: Apply) -> None:
    def declines(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        raise Decline("never")

    hopkit.register(plugin(gives(3)), "loser")
    hopkit.register(plugin(declines, overrides="loser"), "winner")
    assert answer(op) == 3


def test_three_plugins_in_a_row(op: Apply) -> None:
    hopkit.register(plugin(gives(1), overrides="b"), "a")
    hopkit.register(plugin(gives(2), overrides="c"), "b")
    hopkit.register(plugin(gives(3)), "c")
    assert [a.plugin for a in op.table["device"]] == ["a", "b", "c", "hopkit.rules.device"]


def test_two_that_override_a_third_are_still_two(op: Apply) -> None:
    hopkit.register(plugin(gives(3)), "c")
    hopkit.register(plugin(gives(1), overrides="c"), "a")
    with pytest.raises(RuleConflictError, match="'a' and 'b' and 'c'"):
        hopkit.register(plugin(gives(2), overrides="c"), "b")
    assert answer(op) == 1


def test_two_that_override_each_other_are_a_conflict(op: Apply) -> None:
    hopkit.register(plugin(gives(1), overrides="b"), "a")
    with pytest.raises(RuleConflictError):
        hopkit.register(plugin(gives(2), overrides="a"), "b")


def test_one_that_overrides_both_settles_a_conflict_of_others(op: Apply) -> None:
    hopkit.register(plugin(gives(1), overrides=("a", "b")), "referee")
    hopkit.register(plugin(gives(2)), "a")
    hopkit.register(plugin(gives(3)), "b")
    assert answer(op) == 1


def test_behind_the_one_that_settles_a_conflict_it_is_still_there(op: Apply) -> None:
    def declines(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        raise Decline("never")

    hopkit.register(plugin(declines, overrides=("a", "b")), "referee")
    hopkit.register(plugin(gives(2)), "a")
    hopkit.register(plugin(gives(3)), "b")
    with pytest.raises(RuleConflictError, match="'a' and 'b'"):
        answer(op)


def test_a_conflict_that_was_there_before_stops_nobody_else(op: Apply, host: Kit) -> None:
    host.plugins.register(plugin(gives(2)), "a")  # as installed plugins are: side by side, then all ops follow
    host.plugins.register(plugin(gives(3)), "b")
    hopkit.register(plugin(gives(4), op="t_unrelated"), "unrelated")
    with pytest.raises(RuleConflictError, match="'a' and 'b'"):
        answer(op)
    hopkit.unregister("b")
    assert answer(op) == 2


# Coming and going


def test_the_value_changes_whenever_a_plugin_comes_or_goes(op: Apply) -> None:
    graph = torch.fx.symbolic_trace(lambda x: x)

    def through_torch() -> float:
        found: Tensor = torch.ops.higher_order.t_apply(graph, (X,))[0]
        return found[0].item()

    seen = []
    for _ in range(2):
        seen.append(answer(op))
        hopkit.register(plugin(gives(2)), "two")
        seen.append(answer(op))
        hopkit.unregister("two")
    seen.append(answer(op))
    assert seen == [0, 2, 0, 2, 0]


def test_ops_defined_later_are_served_too() -> None:
    hopkit.register(plugin(gives(2)), "two")

    @hopkit.define("t_later")
    def later(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x)

    assert answer(later) == 2
    hopkit.unregister("two")
    assert answer(later) == 0


def test_an_op_that_was_replaced_follows_while_it_is_gone_and_when_it_is_back(op: Apply) -> None:
    @hopkit.define("t_apply", replace=True)
    def newer(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x) + 10

    hopkit.register(plugin(gives(2)), "two")
    assert answer(op) == 2
    hopkit.undefine(newer)
    assert hopkit.ops()["t_apply"] is op
    hopkit.unregister("two")
    assert answer(op) == 0


# What a rule must look like


def test_a_rule_with_another_signature_is_refused_and_says_what_was_expected(op: Apply) -> None:
    with pytest.raises(
        PluginError, match=r"op 't_apply', rule for 'device'.*takes \(x\).*takes \(body: Subgraph, x: Tensor\)"
    ):
        op.rule("device")(lambda x: x)  # type: ignore[arg-type, misc] # the mistake
    assert answer(op) == 0


def test_a_rule_with_its_arguments_in_another_order_is_refused(op: Apply) -> None:
    with pytest.raises(PluginError, match=r"takes \(x, body\)"):
        op.rule("device")(lambda x, body: x)  # type: ignore[arg-type, return-value] # the mistake


@pytest.mark.parametrize(("mode", "wanted"), [("autograd", r"\(call\)"), ("proxy", r"\(tracer, call\)")])
def test_a_rule_of_a_mode_of_calls_takes_what_the_mode_passes(op: Apply, mode: str, wanted: str) -> None:
    with pytest.raises(PluginError, match=f"a function that takes {wanted}"):
        op.rule(mode)(lambda: None)


@pytest.mark.parametrize(("there", "missing"), [("forward", "backward"), ("backward", "forward")])
def test_half_a_derivative_is_refused(op: Apply, there: str, missing: str) -> None:
    with pytest.raises(PluginError) as caught:
        op.rule("autograd")(SimpleNamespace(**{there: lambda *args: args}))
    assert caught.value.found == f"gave an object with `{there}` and without `{missing}`"
    assert "`forward(body: Subgraph, x: Tensor) -> (out, saved)` and `backward(saved, *gradients)`" in caught.value.todo


@pytest.mark.parametrize("device", ["tpu9000", "cuda:0"])
def test_a_device_that_torch_does_not_know_is_refused(op: Apply, device: str) -> None:
    with pytest.raises(PluginError, match=device):
        op.rule("device", device=device)(lambda body, x: x)


def test_only_device_rules_have_devices(op: Apply) -> None:
    with pytest.raises(PluginError, match="device 'cpu' in mode 'fake'"):
        op.rule("fake", device="cpu")(lambda body, x: x)  # type: ignore[call-overload] # the mistake


def test_a_mode_that_nobody_knows_is_refused(op: Apply) -> None:
    with pytest.raises(PluginError, match=r"cannot have a rule in mode 'defice'.*Modes that take rules are .*autograd"):
        op.rule("defice")(lambda body, x: x)


def test_a_mode_in_which_the_body_runs_takes_no_rule(op: Apply) -> None:
    with pytest.raises(PluginError, match="mode 'subclass', in which its body runs"):
        op.rule("subclass")(lambda body, x: x)
