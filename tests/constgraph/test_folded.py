"""A folded module is one like any other: it reads its weights where they are, is copied, pickled and replicated."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hopkit
from hopkit_constgraph import Policy, fold, module_of, report_of, run_const_graph_once, stats
from tests.constgraph.models import IMAGE, Convolved, Merged, X
from tests.fresh import python
from tests.recording import nodes, same

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch 2.13, of its own pytrees


def pair() -> tuple[Merged, Any]:
    model = Merged()
    return model, fold(model, (X,))


class Deep(nn.Module):
    """Weights at the top, in a list, tied, and buffers that are saved and not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.layers[1].weight = self.layers[0].weight
        self.register_buffer("shift", torch.rand(8))
        self.register_buffer("table", torch.rand(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.layers
        for layer in layers:
            x = layer(x) * self.scale.exp() + self.get_buffer("shift").sin() + self.get_buffer("table").cos()
        return x @ cast("Tensor", layers[0].weight.tanh())


def test_every_kind_of_weight_is_read() -> None:
    model = Deep()
    folded: Any = fold(model, (X,))
    with torch.no_grad():
        same(folded(X), model(X))
        for update in (*model.parameters(), *model.buffers()):
            update.mul_(1.5)
            same(folded(X), model(X))
    assert folded.state_dict().keys() == model.state_dict().keys()


def test_another_module_in_the_place_of_one_is_seen() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        folded.base = nn.Linear(8, 8)
        model.base = folded.base
        same(folded(X), model(X))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_parametrization_comes_and_goes() -> None:
    model, folded = pair()
    with torch.no_grad():
        for _ in range(2):
            same(folded(X), model(X))
            for each in (model, folded):
                parametrize.register_parametrization(each.base, "weight", Doubled())
            same(folded(X), model(X))
            model.base.parametrizations.weight.original.add_(1.0)  # type: ignore[union-attr, operator] # torch's own
            folded.base.parametrizations.weight.original.copy_(model.base.parametrizations.weight.original)  # type: ignore[union-attr]
            same(folded(X), model(X))
            for each in (model, folded):
                parametrize.remove_parametrizations(each.base, "weight")


def test_other_weights_for_one_call() -> None:
    model, folded = pair()
    other = {name: value.detach() * 2 for name, value in model.named_parameters()}
    same(torch.func.functional_call(folded, other, (X,)), torch.func.functional_call(model, other, (X,)))
    same(folded(X), model(X))


def test_a_copy_is_whole() -> None:
    model = Deep()
    folded = fold(model, (X,))
    other: Any = copy.deepcopy(folded)
    assert nodes(other, run_const_graph_once) == 1
    assert other.state_dict().keys() == folded.state_dict().keys()
    with torch.no_grad():
        other.scale.add_(1.0)
        same(folded(X), model(X))
        model.scale.add_(1.0)
        same(other(X), model(X))


def test_it_pickles() -> None:
    model = Deep()
    folded = fold(model, (X,))
    with torch.no_grad():
        model.scale.add_(1.0)
        other: Any = pickle.loads(pickle.dumps(folded))
        assert nodes(other, run_const_graph_once) == 1
        same(other(X), model(X))
        for each in (model, other):
            each.scale.mul_(2)
        same(other(X), model(X))
    assert other.scale.requires_grad
    assert (stats(other).hits, stats(other).misses) == (0, 2)


def test_it_is_saved_and_loaded_in_another_process(tmp_path: Path) -> None:
    model, folded = pair()
    torch.save(folded, tmp_path / "folded.pt")
    torch.save(model(X).detach(), tmp_path / "want.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1] + '/folded.pt', weights_only=False)\n"
        "x = torch.linspace(-1.0, 1.0, 16).reshape(2, 8)\n"
        "torch.testing.assert_close(model(x).detach(), torch.load(sys.argv[1] + '/want.pt'))\n"
        "with torch.no_grad():\n"
        "    before = model(x)\n"
        "    model.base.weight.add_(1.0)\n"
        "    assert not torch.equal(before, model(x))\n"
    )
    python("-c", code, tmp_path)


def test_sizes_that_vary_still_do_after_pickling() -> None:
    model = Merged()
    folded: Any = fold(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    other = pickle.loads(pickle.dumps(folded))
    more = X[:1].repeat(7, 1)
    same(other(more), model(more))


def replicas(module: nn.Module, count: int) -> list[Any]:
    """As torch.nn.parallel.replicate makes them, on devices that a CPU does not have."""
    modules = list(module.modules())
    made: list[Any] = []
    for _ in range(count):
        copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in modules}
        for original, replica in copies.items():
            for key, child in original._modules.items():
                setattr(replica, key, child if child is None else copies[child])
            replica._former_parameters = OrderedDict()
            for key, value in original._parameters.items():
                if value is None:
                    replica._parameters[key] = None
                else:
                    setattr(replica, key, value * 1.0)  # no leaf any more
            for key, buffer in original._buffers.items():
                setattr(replica, key, None if buffer is None else buffer.clone())
        made.append(copies[module])
    return made


@pytest.mark.parametrize("kind", [Merged, Deep])
def test_replicas_give_gradients_to_the_weights_of_the_model(kind: type[nn.Module]) -> None:
    model = kind()
    folded = fold(model, (X,))
    folded(X)
    for _ in range(2):
        outputs = [replica(X) for replica in replicas(folded, 2)]
        same(outputs, [model(X)] * 2)
        parameters = list(model.parameters())
        got = torch.autograd.grad(sum(output.sin().sum() for output in outputs), parameters)
        same(got, torch.autograd.grad(2 * model(X).sin().sum(), parameters))
        with torch.no_grad():
            parameters[0].mul_(2)


def test_it_stays_in_the_mode_in_which_it_was_traced() -> None:
    folded = fold(Convolved().eval(), (IMAGE,))
    assert folded.eval() is folded
    with pytest.raises(hopkit.HopkitError, match=r"a folded model is in evaluation for good"):
        folded.train()
    trained = fold(Merged(), (X,))
    assert trained.train() is trained
    with pytest.raises(hopkit.HopkitError, match=r"Fold the model again: `fold\(model.eval\(\), inputs\)`"):
        trained.eval()


@pytest.mark.parametrize("wrong", [(), (X, X), (X[:, :4],), (X[:1],), ([X],)])
def test_inputs_that_do_not_fit_are_errors(wrong: tuple[object, ...]) -> None:
    _, folded = pair()
    with pytest.raises((TypeError, AssertionError, RuntimeError, AttributeError, ValueError)):
        folded(*wrong)


class Named(Merged):
    def forward(self, inputs: Any, *, scale: float = 1.0) -> Any:
        return {"y": super().forward(inputs["x"]) * scale}


def test_nested_inputs_are_held_against_their_tree() -> None:
    model = Named()
    folded: Any = fold(model, ({"x": X},), kwargs={"scale": 2.0})
    same(folded({"x": X}, scale=2.0), model({"x": X}, scale=2.0))
    same(pickle.loads(pickle.dumps(folded))({"x": X}, scale=2.0), model({"x": X}, scale=2.0))
    with pytest.raises(ValueError, match="input tree spec"):
        folded({"x": X, "more": X}, scale=2.0)
    with pytest.raises((AssertionError, ValueError)):
        folded({"x": X}, scale=3.0)


def test_reading_is_quick_code() -> None:
    _, folded = pair()
    assert '._parameters["weight"]' in folded.code
    assert '._parameters["weight"]' in copy.deepcopy(folded).code


def test_a_child_of_another_module() -> None:
    model, folded = pair()
    outer = nn.Sequential(folded, nn.ReLU())
    assert set(outer.state_dict()) == {f"0.{name}" for name in model.state_dict()}
    want = torch.nn.functional.relu(model(X))
    same(outer(X), want)
    again = fold(outer, (X,), policy=Policy(norms=False))
    same(again(X), want)
    file = io.BytesIO()
    torch.save(outer.state_dict(), file)


def test_a_report_of_a_copy_is_none_of_this_fold() -> None:
    _, folded = pair()
    with pytest.raises(hopkit.HopkitError, match="a copy, or what was loaded, has no report"):
        report_of(copy.deepcopy(folded))


class Flat(Merged):
    def forward(self, input: Tensor, other: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        result = super().forward(input) * scale
        return result if other is None else result + other


def test_plain_inputs_keep_their_names_and_are_checked() -> None:
    model = Flat()
    folded: Any = fold(model, (X,), kwargs={"other": X.cos(), "scale": 2.0})
    want = model(X, X.cos(), scale=2.0)
    for each in (folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        same(each(X, other=X.cos(), scale=2.0), want)
        same(each(scale=2.0, other=X.cos(), input=X), want)
        with pytest.raises((AssertionError, RuntimeError)):
            each(X, other=X.cos(), scale=3.0)
        with pytest.raises((AssertionError, RuntimeError)):
            each(X[:1], other=X.cos(), scale=2.0)
        with pytest.raises(TypeError):
            each(X, other=X.cos(), scale=2.0, more=1)
        assert "self._checked(" in each.code
    none: Any = fold(model, (X, None))
    same(none(X, None), model(X))
    with pytest.raises(TypeError, match="the model was traced with other=None"):
        none(X, X)
    same(torch.fx.Interpreter(folded).run(X, X.cos(), 2.0), want)
    same(
        torch.export.export(folded, (X,), {"other": X.cos(), "scale": 2.0}).module()(X, other=X.cos(), scale=2.0), want
    )
    compiled: Any = torch.compile(folded, backend="aot_eager", fullgraph=True)
    same(compiled(X, other=X.cos(), scale=2.0), want)


def test_a_call_goes_the_short_way() -> None:
    model, folded = pair()
    with torch.no_grad():
        same(folded(X), model(X))
        ran: set[str] = set()
        before = sys.getprofile()
        sys.setprofile(lambda frame, *_: ran.add(frame.f_code.co_filename))
        try:
            folded(X)
        finally:
            sys.setprofile(before)
    around = ("_dynamo", "_config_module.py", "_torch/operator.py", "autograd/function.py")
    assert not [name for name in ran for part in around if part in name]
    assert any(name.endswith("kept.py") for name in ran)


def test_a_loaded_program_is_a_module_like_a_folded_one(tmp_path: Path) -> None:
    model = Flat()
    path = tmp_path / "folded.pt2"
    torch.export.save(fold(torch.export.export(model, (X, X.cos()))), path)
    made: Any = module_of(torch.export.load(path))
    for each in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        same(each(X, other=X.cos()), model(X, X.cos()))
        assert "self._once(" in each.code
        assert "self._checked(" in each.code
        with pytest.raises((AssertionError, RuntimeError)):
            each(X[:1], X.cos())
    with torch.no_grad():
        made.base.weight.mul_(2)
        model.base.weight.mul_(2)
        same(made(X, X.cos()), model(X, X.cos()))
        assert stats(made).misses == 2
    with pytest.raises(hopkit.HopkitError, match="got a Flat"):
        module_of(cast("Any", model))


def test_a_program_without_example_inputs_is_a_module_too() -> None:
    model = Merged()
    program = fold(torch.export.export(model, (X,)))
    program._example_inputs = None
    same(module_of(program)(X), model(X))
