"""``import hopkit`` stays light."""

from __future__ import annotations

import json

import pytest

from tests.fresh import python

COMPILERS = ("torch._dynamo", "torch._inductor")


def _loaded_by(statement: str) -> set[str]:
    """What a fresh interpreter has loaded after ``statement`` that ``import torch`` had not."""
    listed = "print(json.dumps(sorted(set(sys.modules) - before)))"
    program = f"import json, sys, torch; before = set(sys.modules); {statement}; {listed}"
    done = python("-c", program)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("module", ["hopkit", "hopkit.extend", "hopkit.testing", "hopkit_constgraph"])
def test_importing_loads_no_compiler(module: str) -> None:
    assert not [name for name in _loaded_by(f"import {module}") if name.startswith(COMPILERS)]


def test_importing_hopkit_loads_no_plugin_and_no_test_tool() -> None:
    loaded = _loaded_by("import hopkit")
    assert not [name for name in loaded if name.startswith(("hopkit_", "hopkit.rules", "hopkit.testing", "hopkit.cli"))]
    assert not loaded & {"pytest", "hypothesis"}


def test_defining_and_calling_loads_no_compiler() -> None:
    call = (
        "import hopkit, hopkit_constgraph; hopkit.ops();"
        " graph = torch.fx.symbolic_trace(torch.nn.ReLU());"
        " hopkit_constgraph.run_const_graph(graph, (torch.ones(2),))"
    )
    assert not [name for name in _loaded_by(call) if name.startswith(COMPILERS)]
