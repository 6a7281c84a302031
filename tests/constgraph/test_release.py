"""Weights that a fold lets go of: the constants stay right, and whoever touches such a weight is told."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hopkit
from hopkit_constgraph import Policy, fold, report_of, run_const_graph_once
from tests.constgraph.models import IMAGE, Convolved, Merged, X
from tests.recording import nodes, same
from tests.saving import again

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
    pytest.mark.filterwarnings("ignore:Please add support for subgraph args:UserWarning"),  # torch's, of any node kept
]

RELEASE = Policy(release=True)
GONE = r"weight '.*' was released when its model was folded"


def released() -> tuple[Merged, Any, Tensor]:
    model = Merged()
    want = model(X).detach()
    return model, fold(model, (X,), policy=RELEASE), want


def test_the_constants_are_there_and_the_weights_are_not() -> None:
    _, folded, want = released()
    same(folded(X), want)
    assert sorted(folded.state_dict()) == ["_constant_add", "base.bias"]
    assert nodes(folded, run_const_graph_once) == 0
    report = report_of(folded)
    assert report.released == ("base.weight", "down.weight", "up.weight")
    assert report.summary().endswith("; 3 weights released")


def test_their_memory_is_given_back_though_the_model_lives() -> None:
    model = Merged()
    memory = weakref.ref(model.base.weight.untyped_storage())
    gone = weakref.ref(model.base.weight.data)
    fold(model, (X,), policy=RELEASE)
    gc.collect()
    assert gone() is None
    assert memory() is None


def _read(model: Merged) -> None:
    model.base.weight + 1


def _call(model: Merged) -> None:
    model(X)


def _write(model: Merged) -> None:
    model.base.weight.mul_(2)


def _fill(model: Merged) -> None:
    nn.init.zeros_(model.base.weight)


def _swap(model: Merged) -> None:
    model.base.weight.data = torch.ones(8, 8)


def _load(model: Merged) -> None:
    model.load_state_dict(Merged().state_dict())


def _assign(model: Merged) -> None:
    model.load_state_dict(Merged().state_dict(), assign=True)


def _optimize(model: Merged) -> None:
    torch.optim.SGD(model.parameters(), lr=1.0)


def _move(model: Merged) -> None:
    model.to(torch.float64)


def _copy(model: Merged) -> None:
    copy.deepcopy(model)


def _save(model: Merged) -> None:
    model.state_dict()


@pytest.mark.parametrize("touch", [_read, _call, _write, _fill, _swap, _load, _assign, _optimize, _move, _copy, _save])
def test_whoever_touches_a_released_weight_is_told(touch: Callable[[Merged], None]) -> None:
    model, folded, want = released()
    with torch.no_grad(), pytest.raises(hopkit.HopkitError, match=GONE):
        touch(model)
    same(folded(X), want)


def test_an_optimizer_from_before_is_told() -> None:
    model = Merged()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(X).sum().backward()
    fold(model, (X,), policy=RELEASE)
    with pytest.raises(hopkit.HopkitError, match=GONE):
        optimizer.step()


def test_a_released_weight_can_be_printed() -> None:
    model, _, _ = released()
    assert repr(model.base.weight) == "<weight 'base.weight', released>"


@pytest.mark.parametrize("strict", [True, False])
def test_the_folded_model_takes_no_released_weight(strict: bool) -> None:
    _, folded, want = released()
    for model, state in (
        (folded, Merged().state_dict()),
        (nn.Sequential(folded), nn.Sequential(Merged()).state_dict()),
    ):
        with pytest.raises(hopkit.HopkitError, match=r"weight 'base.weight, down.weight, up.weight' was released"):
            model.load_state_dict(state, strict=strict)
    folded.load_state_dict(folded.state_dict())
    same(folded(X), want)


def test_a_parameter_that_nobody_would_read_is_refused() -> None:
    _, folded, _ = released()
    for model in (folded, copy.deepcopy(folded)):
        with pytest.raises(hopkit.HopkitError, match=r"weight 'base.weight' was released"):
            model.base.weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(AttributeError, match="weight"):
        _ = folded.base.weight
    folded.base.bias = nn.Parameter(torch.zeros(8))  # this one is still there


def test_it_is_copied_pickled_compiled_and_exported() -> None:
    _, folded, want = released()
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        same(other(X), want)
        with pytest.raises(hopkit.HopkitError, match="was released"):
            other.load_state_dict(Merged().state_dict(), strict=False)
    compiled: Any = torch.compile(folded, backend="aot_eager", fullgraph=True)
    same(compiled(X), want)
    same(again(torch.export.export(folded, (X,))).module()(X), want)


def test_of_a_program() -> None:
    model = Merged()
    want = model(X).detach()
    program = torch.export.export(model, (X,))
    folded = fold(program, policy=RELEASE)
    for found in (folded, again(folded)):
        assert sorted(found.state_dict) == ["_constant_add", "base.bias"]
        same(found.module()(X), want)
    with pytest.raises(hopkit.HopkitError, match=GONE):
        program.module()(X)


def test_of_a_graph() -> None:
    model = Merged()
    want = model(X).detach()
    folded: Any = fold(torch.export.export(model, (X,)).module(), policy=RELEASE)
    same(folded(X), want)
    assert sorted(folded.state_dict()) == ["_constant_add", "base.bias"]


def test_norms_are_released() -> None:
    model = Convolved().eval()
    want = model(IMAGE).detach()
    folded = fold(model, (IMAGE,), policy=RELEASE)
    same(folded(IMAGE), want)
    kept = [value.numel() for name, value in folded.state_dict().items() if "num_batches_tracked" not in name]
    assert sorted(kept) == [4, 4, 3 * 4 * 9, 4 * 4 * 9]


class Shares(nn.Module):
    """A weight that the constants use, and the rest of the model too; and tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.one, self.tied = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.both(x), self.both.weight.sin())
        return nn.functional.linear(x, self.one.weight.cos()) + nn.functional.linear(x, self.tied.weight.cos())


def test_what_something_else_uses_is_kept_and_followed() -> None:
    torch.manual_seed(0)
    model = Shares()
    twin = copy.deepcopy(model)
    folded: Any = fold(model, (X,), policy=RELEASE)
    assert report_of(folded).released == ("one.weight", "tied.weight")
    assert nodes(folded, run_const_graph_once) == 1
    with torch.no_grad():
        same(folded(X), twin(X))
        model.both.weight.mul_(2)
        twin.both.weight.mul_(2)
        same(folded(X), twin(X))


def test_a_fold_that_fails_releases_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Merged()
    want = model(X).detach()

    def full(*_: object) -> None:
        raise MemoryError("there is no more")

    monkeypatch.setattr(torch.fx.GraphModule, "__call__", full)
    program = torch.export.export(model, (X,))
    with pytest.raises(MemoryError):
        fold(program, policy=RELEASE)
    same(model(X), want)
