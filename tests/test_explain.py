"""``hopkit.explain``: who answers in which mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hopkit
from hopkit import Subgraph, explain
from hopkit.explain import Row
from hopkit.extend import Mode, OpSpec, Rule, hookimpl
from hopkit.extend.mode import TorchDispatchMode
from hopkit.kit import Kit
from hopkit.spec import AutogradPolicy


@pytest.fixture(autouse=True)
def host(hopkit_fresh: Kit) -> Kit:
    return hopkit_fresh


def define_once(
    autograd: AutogradPolicy = "derive", outputs: Callable[..., object] | None = None
) -> hopkit.Op[[Subgraph, torch.Tensor], torch.Tensor]:
    @hopkit.define("demo_once", autograd=autograd, outputs=outputs)
    def once(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)

    return once


def row(op: hopkit.Op[..., object], mode: str) -> Row:
    (found,) = (row for row in explain(op).rows if row.mode == mode)
    return found


def doubled(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
    return body(x) * 2


class Doubling:
    """A plugin that answers for every op in mode "fake"."""

    @hookimpl
    def hopkit_fake_rule(self, op: OpSpec) -> Rule | None:
        return doubled


@pytest.mark.parametrize("mode", ["dynamo", "vmap", "jvp", "autograd", "functionalize", "proxy", "fake", "device"])
def test_every_rule_follows_from_the_body(mode: str) -> None:
    found = row(define_once(), mode)
    assert (found.kind, found.plugin, found.asked) == ("derived", f"hopkit.rules.{mode}", (f"hopkit.rules.{mode}",))


def test_torch_func_differentiates_as_autograd_does() -> None:
    assert row(define_once(), "grad").kind == "derived"


@pytest.mark.parametrize("mode", ["user_mode", "subclass"])
def test_the_body_runs_in_a_mode_that_takes_no_rules(mode: str) -> None:
    assert row(define_once(), mode).kind == "decomposing"


@pytest.mark.parametrize("policy", ["deferred_error", "error"])
def test_an_op_without_a_derivative_refuses(policy: AutogradPolicy) -> None:
    found = row(define_once(autograd=policy), "autograd")
    assert (found.kind, found.note) == ("refusing", f'autograd="{policy}"')


def test_outputs_answer_for_fake_tensors() -> None:
    found = row(define_once(outputs=lambda body, x: torch.empty_like(x)), "fake")
    assert (found.kind, found.note) == ("derived", "from outputs=")


def test_a_rule_of_the_author_is_shown_with_its_place() -> None:
    once = define_once()
    once.rule("fake")(doubled)
    line = doubled.__code__.co_firstlineno
    assert row(once, "fake") == Row(
        "fake",
        "hand-written",
        "author",
        f"{__file__}:{line}",
        ("author", "hopkit.rules.fake"),
        "may decline to hopkit.rules.fake",
    )


def test_a_rule_for_one_device_has_a_row_of_its_own() -> None:
    once = define_once()
    once.rule("device", device="cpu")(doubled)
    assert (row(once, "device").kind, row(once, "device (cpu)").kind) == ("derived", "hand-written")


def test_a_rule_of_a_plugin_is_shown_with_its_plugin() -> None:
    once = define_once()
    hopkit.register(Doubling(), "doubling")
    found = row(once, "fake")
    assert (found.kind, found.plugin, found.asked) == ("hand-written", "doubling", ("doubling", "hopkit.rules.fake"))


def test_a_place_that_two_plugins_claim_is_a_conflict_of_both(host: Kit) -> None:
    host.plugins.register(Doubling(), "left")  # as installed plugins are: side by side, then ops follow
    host.plugins.register(Doubling(), "right")
    found = row(define_once(), "fake")
    assert (found.kind, found.plugin, found.asked[:2]) == ("conflict", "right, left", ("right", "left"))
    assert "op 'demo_once' in mode 'fake' is claimed by plugins 'left' and 'right'" in found.note


def test_behind_a_rule_that_goes_before_both_a_conflict_is_named(host: Kit) -> None:
    host.plugins.register(Doubling(), "left")
    host.plugins.register(Doubling(), "right")
    once = define_once()
    once.rule("fake")(doubled)
    found = row(once, "fake")
    assert (found.kind, found.note) == ("hand-written", "may decline to right, left, hopkit.rules.fake")


def test_a_mode_that_nobody_answers_for_is_missing() -> None:
    class Mine(TorchDispatchMode):
        pass

    class Brings:
        @hookimpl
        def hopkit_add_modes(self) -> list[Mode]:
            return [Mode("mine", Mine, "nothing yet")]

    once = define_once()
    hopkit.register(Brings(), "brings")
    assert row(once, "mine").kind == "missing"


def test_an_explanation_prints_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    title, where, blank, header, *rows = str(explain(define_once())).splitlines()
    assert title == "demo_once(body: Subgraph, x: Tensor)"
    assert where.startswith("tests.test_explain.define_once.<locals>.once, test_explain.py:")
    assert not blank
    assert header.split() == ["mode", "answer", "by", "where", "asked", "note"]
    assert ["autograd", "derived", "hopkit.rules.autograd"] in [row.split()[:3] for row in rows]


# Names


@pytest.mark.parametrize("name", ["demo_once", "once", "tests.test_explain.once", "tests.once"])
def test_an_op_has_the_name_that_torch_knows_and_its_authors(name: str) -> None:
    define_once()
    assert explain(name).op == "demo_once"


@pytest.mark.parametrize("name", ["demo_onec", "test_explain.once"])
def test_an_unknown_name_gets_a_suggestion(name: str) -> None:
    define_once()
    with pytest.raises(hopkit.UnknownOpError, match=r"is not defined.*Did you mean '(demo_)?once'"):
        explain(name)


def test_a_name_of_two_ops_is_refused_with_both() -> None:
    def define(name: str) -> Callable[..., object]:
        @hopkit.define(name)
        def once(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
            return body(x)

        return once

    define("demo_a")
    define("demo_b")
    with pytest.raises(hopkit.UnknownOpError, match="is one of several: 'demo_a', 'demo_b'"):
        explain("once")
