"""torch.ops.higher_order: an operator that is missing may be a plugin's, and nothing else changes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit import kit
from hopkit._torch import namespace
from tests.recording import define_once
from tests.saving import Package, python

UNPICKLE = """
import pickle, sys, torch, hopkit
from pathlib import Path
import torch._higher_order_ops.triton_kernel_wrap  # torch 2.13 forgets it, for any graph with a higher-order operator
assert "t_pkg" not in sys.modules
graph = pickle.loads(Path(sys.argv[1]).read_bytes())
torch.testing.assert_close(graph(torch.ones(3)), torch.ones(3).sin().sin())
"""
MISSING = """
import sys, torch, hopkit
assert hasattr(torch.ops.higher_order, "cond") and "torch.ops.higher_order" in repr(torch.ops.higher_order)
assert not hasattr(torch.ops.higher_order, "_private") and not hasattr(torch.ops.higher_order, "__path__")
assert "t_pkg" not in sys.modules
assert not hasattr(torch.ops.higher_order, "nonexistent")
assert "t_pkg" in sys.modules
assert torch.ops.higher_order.t_pkg_apply is sys.modules["t_pkg"].apply.operator
assert "t_pkg_apply" in list(torch.ops.higher_order)
"""


def test_only_what_is_missing_loads_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python(MISSING, path=str(Package(tmp_path, monkeypatch).folder))


@pytest.mark.usefixtures("hopkit_fresh")
def test_a_graph_is_unpickled_where_nobody_imported_its_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Package(tmp_path, monkeypatch).imported()
    graph = make_fx(lambda x: module.apply(torch.sin, x))(torch.ones(3))
    (tmp_path / "graph.pkl").write_bytes(pickle.dumps(graph))
    python(UNPICKLE, tmp_path / "graph.pkl", path=str(tmp_path))


@pytest.mark.usefixtures("hopkit_fresh")
def test_what_is_undefined_is_missing_and_what_is_replaced_is_the_newest() -> None:
    once = define_once()
    assert torch.ops.higher_order.t_once is once.operator

    @hopkit.define("t_once", replace=True)
    def newest(body: hopkit.Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)

    assert torch.ops.higher_order.t_once is newest.operator
    hopkit.undefine(newest)
    assert torch.ops.higher_order.t_once is once.operator
    hopkit.undefine(once)
    assert not namespace.has("t_once")
    with pytest.raises(AttributeError, match=r"'torch\.ops\.higher_order' object has no attribute 't_once'"):
        torch.ops.higher_order.t_once  # noqa: B018 # it is the reading that fails


def test_watching_again_asks_the_newest_alone() -> None:
    asked: list[str] = []
    try:
        namespace.watch(lambda: asked.append("first"))
        namespace.watch(lambda: asked.append("second"))
        assert not hasattr(torch.ops.higher_order, "nonexistent")
    finally:
        namespace.watch(lambda: kit.current().load())
    assert asked == ["second"]
