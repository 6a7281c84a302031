"""Folded programs as AOTInductor packages: values are right, and weights can be updated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hopkit_constgraph import fold
from tests.constgraph.models import Merged, X
from tests.recording import same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's, of its own code
    pytest.mark.filterwarnings("ignore:Please add support for subgraph args:UserWarning"),  # torch's, of any node kept
]


@pytest.mark.parametrize("folding", [False, True])
def test_a_package_gives_what_the_model_gives(tmp_path: Path, folding: bool) -> None:
    from torch._inductor import aoti_compile_and_package, aoti_load_package  # loads torch's compiler

    model = Merged()
    program = fold(torch.export.export(model, (X,)))
    options = {"aot_inductor.use_runtime_constant_folding": folding}
    path = aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"), inductor_configs=options)
    packaged: Any = aoti_load_package(path)
    same(packaged(X), model(X))
    with torch.no_grad():
        model.base.weight.mul_(2)
        model.up.weight.add_(1)
    names = packaged.get_constant_fqns()
    state = dict(model.state_dict())
    packaged.load_constants({name: state[name] for name in names}, check_full_update=True)
    same(packaged(X), model(X))
