"""The example plugin, as it is installed."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import pytest
import torch
from hopkit_example import LogOps, Made, repeat
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
import hopkit_constgraph
from hopkit.testing import check


def test_it_is_installed_and_says_what_it_supplies() -> None:
    (info,) = [info for info in hopkit.plugins() if info.name == "example"]
    assert (info.distribution, info.error) == ("hopkit-example", "")
    assert info.ops == ("example_repeat",)
    assert info.modes == ("log_ops", "made")
    assert info.hooks == (
        "hopkit_add_columns",
        "hopkit_add_modes",
        "hopkit_add_ops",
        "hopkit_fake_rule",
        "hopkit_log_ops_rule",
        "hopkit_made_rule",
    )


def test_the_op_is_right_in_every_mode() -> None:
    report = check(repeat)
    assert report.ok, str(report)


def _record() -> torch.fx.GraphModule:
    double = torch.fx.symbolic_trace(lambda w: w * 2)
    return make_fx(lambda w: hopkit_constgraph.run_const_graph(double, (w,)), tracing_mode="fake")(torch.ones(3))


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "hopkit_example"]


def test_the_rule_for_constgraph_run_logs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="hopkit_example"):
        graph = _record()
    (message,) = _messages(caplog)
    assert message.startswith("shapes of 3 nodes in ")
    assert torch.equal(graph(torch.ones(3)), torch.full((3,), 2.0))


def test_the_rule_declines_while_nobody_reads_the_log(caplog: pytest.LogCaptureFixture) -> None:
    graph = _record()
    assert not _messages(caplog)
    assert torch.equal(graph(torch.ones(3)), torch.full((3,), 2.0))


def test_the_mode_takes_every_op_whole() -> None:
    double = torch.fx.symbolic_trace(lambda w: w * 2)
    x = torch.ones(3)
    with LogOps() as log:
        repeat(torch.sin, x)
        hopkit_constgraph.run_const_graph(double, (x,))
        torch.cos(x)
    assert log.names == ["example_repeat", "constgraph_run", "aten.cos.default"]


def test_gradients_pass_through_the_mode() -> None:
    x = torch.rand(3, requires_grad=True)
    with LogOps():
        result = repeat(torch.sin, x)
    (found,) = torch.autograd.grad(result.sum(), x)
    (wanted,) = torch.autograd.grad(x.sin().sin().sum(), x)
    torch.testing.assert_close(found, wanted)


def test_the_class_takes_every_op_whole() -> None:
    double = torch.fx.symbolic_trace(lambda w: w * 2)
    x = Made(torch.ones(3))
    for result, by in [
        (repeat(torch.sin, x), "example_repeat"),
        (hopkit_constgraph.run_const_graph(double, (x,)), "constgraph_run"),
        (torch.cos(x), "aten.cos.default"),
    ]:
        assert isinstance(result, Made)
        assert result.by == by


def test_every_op_has_a_column_for_the_mode_and_one_for_the_class() -> None:
    for op in (repeat, hopkit.ops()["constgraph_run"]):
        report = check(op, modes=["example"])
        assert {cell.mode for cell in report.cells} == {"log_ops", "made"}
        assert {cell.verdict for cell in report.cells} == {"right"}, str(report)


def test_mode_and_class_are_short() -> None:
    source = Path(inspect.getsourcefile(LogOps) or "")
    assert source == Path(inspect.getsourcefile(Made) or "")
    assert len(source.read_text(encoding="utf-8").splitlines()) < 60
