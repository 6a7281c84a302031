"""``fold``: what is moved, what is left, and that values and gradients are those of the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import hopkit
from hopkit_constgraph import FoldReport, Policy, fold, report_of, run_const_graph_once
from tests.constgraph.models import IMAGE, Convolved, Merged, Quantised, X
from tests.recording import nodes, same
from tests.saving import again

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch 2.13, of its own pytrees


def gradients(model: nn.Module, x: Tensor, names: list[str]) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    return list(torch.autograd.grad(model(x).sin().sum(), [parameters[name] for name in names]))


MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "merged": (Merged(), X),
    "convolved": (Convolved().eval(), IMAGE),
    "weight norm": (nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.ReLU(), weight_norm(nn.Linear(8, 4))), X),
    "spectral norm": (spectral_norm(nn.Linear(8, 8)).eval(), X),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_module_is_what_it_was(name: str) -> None:
    model, x = MODELS[name]
    folded = fold(model, (x,))
    assert nodes(folded, run_const_graph_once) == 1
    with torch.no_grad():
        same(folded(x), model(x))
    shared = dict(model.named_parameters())
    for key, parameter in folded.named_parameters():
        assert parameter is shared[key]
    used = [n for n in shared if gradients_reach(model, x, n)]
    same(gradients(folded, x, used), gradients(model, x, used))


def gradients_reach(model: nn.Module, x: Tensor, name: str) -> bool:
    (found,) = torch.autograd.grad(model(x).sum(), [dict(model.named_parameters())[name]], allow_unused=True)
    return found is not None


def test_the_report_of_a_merge() -> None:
    report = report_of(fold(Merged(), (X,)))
    (constant,) = report.constants
    assert constant.weights == ("base.weight", "down.weight", "up.weight")
    assert (constant.given, constant.taken, report.moved) == (8 * 8 * 4, (64 + 16 + 16) * 4, 2)
    assert report.summary() == "2 nodes moved, which give 1 constants: 256 B from 384 B of weights; 0 nodes left"
    assert report.as_json()["given"] == 256
    assert "base.weight, down.weight, up.weight" in str(report)


def test_a_program_stays_a_program() -> None:
    model = Merged()
    program = torch.export.export(model, (X,))
    folded = fold(program)
    assert isinstance(folded, torch.export.ExportedProgram)
    assert nodes(program.graph_module, run_const_graph_once) == 0
    for found in (folded, again(folded)):
        assert nodes(found.graph_module, run_const_graph_once) == 1
        assert set(found.state_dict) == set(model.state_dict())
        same(found.module()(X), model(X))


def test_a_graph_stays_a_graph() -> None:
    model = Merged()
    graph = torch.export.export(model, (X,)).module()
    folded = fold(graph)
    assert isinstance(folded, torch.fx.GraphModule)
    assert (nodes(graph, run_const_graph_once), nodes(folded, run_const_graph_once)) == (0, 1)
    same(folded(X), model(X))


def test_sizes_may_vary() -> None:
    model = Merged()
    folded = fold(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    same(folded(X[:1].repeat(7, 1)), model(X[:1].repeat(7, 1)))


def test_the_model_stays_as_it_was() -> None:
    model = Merged()
    before = copy.deepcopy(model.state_dict())
    fold(model, (X,))(X)
    same(model.state_dict(), before)
    assert not any("const" in name for name, _ in model.named_modules())


def test_tied_weights_are_computed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.one.weight.tanh()) + nn.functional.linear(x, self.two.weight.tanh())

    model = Tied()
    folded = fold(model, (X,))
    (constant,) = report_of(folded).constants
    assert constant.nodes == 1
    same(folded(X), model(X))


# -- what stays ------------------------------------------------------------------------------------------------------


class Stays(nn.Module):
    """Every kind of thing that is no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        count = self.get_buffer("count")
        count.add_(1.0)
        noise = torch.rand_like(self.weight)
        scratch = self.weight * 2
        scratch.clamp_(max=1.0)
        return x * self.weight.exp() + noise * 0 + count.cos() + scratch


def test_what_is_no_constant_stays_and_is_named() -> None:
    model = Stays()
    folded = fold(model, (X,))
    report = report_of(folded)
    reasons = {left.node: left.reason for left in report.left}
    assert reasons["count"] == "the model writes to it"
    assert "it draws random numbers" in reasons.values()
    assert "it is written to" in reasons.values()
    assert [constant.weights for constant in report.constants] == [("weight",)]
    other = copy.deepcopy(model)
    for _ in range(3):
        same(folded(X), other(X))


def test_what_a_functional_program_changes_stays() -> None:
    program = torch.export.export(Stays(), (X,)).run_decompositions({})
    report = report_of(fold(program))
    assert ("count", "the model writes to it") in [(left.node, left.reason) for left in report.left]


def test_a_folded_model_is_folded_again() -> None:
    model = Merged()
    once = fold(model, (X,), policy=Policy(skip=lambda node: "add" in node.name))
    twice = fold(once)
    assert twice is once  # the sum takes what is no operator of torch
    again = fold(nn.Sequential(once, Merged()), (X,))
    same(again(X), Merged()(model(X)))


def test_a_norm_in_training_stays() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64).reshape(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ nn.functional.batch_norm(self.weight, None, None, training=True)

    model = Normed()
    folded = fold(model, (X,))
    assert folded is model
    assert [left.reason for left in report_of(folded).left] == ["it is in training mode"]


def test_an_operator_that_nobody_knows_stays() -> None:
    @torch.library.custom_op("t_fold::told", mutates_args=())
    def told(x: Tensor) -> Tensor:
        return x * 2

    told.register_fake(torch.empty_like)

    class Telling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            doubled: Tensor = told(self.weight.detach())
            return x * doubled

    report = report_of(fold(Telling(), (X,)))
    assert not report.constants
    assert [left.reason for left in report.left] == ["what else an operator of 't_fold' does is not known"]


def test_a_model_without_constants_is_given_back() -> None:
    model = nn.Linear(8, 8)
    folded = fold(model, (X,))
    assert folded is model
    assert str(report_of(folded)).startswith("nothing is computed from weights alone")


class Laid(nn.Module):
    """A weight that is laid out anew, one that is cast, one that is cast to what it is, and one that is cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned, self.cast = nn.Parameter(torch.rand(8, 8)), nn.Parameter(torch.rand(8, 8).double())
        self.same, self.cut = nn.Parameter(torch.rand(8, 8)), nn.Parameter(torch.rand(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.turned.t().contiguous()
        x = x @ self.cast.to(torch.float32)
        x = x @ self.same.to(torch.float32).contiguous().reshape(4, 16).view(8, 8)
        first, second = self.cut.split(8)
        result: Tensor = x @ first + x @ second.t()
        return result


def test_a_copy_is_folded_and_a_view_is_not() -> None:
    model = Laid()
    folded = fold(model, (X,))
    assert sorted(constant.weights for constant in report_of(folded).constants) == [("cast",), ("turned",)]
    with torch.no_grad():
        for _ in range(2):
            same(folded(X), model(X))
            for weight in model.parameters():
                weight.mul_(1.5)


def test_the_parts_of_a_constant_are_views_of_it() -> None:
    class Parts(Merged):
        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.base.weight * 2).split(4)
            result: Tensor = x @ first.t() + x @ second.t()
            return result

    model = Parts()
    folded = fold(model, (X,))
    (constant,) = report_of(folded).constants
    assert (constant.nodes, constant.given) == (1, 8 * 8 * 4)
    same(folded(X), model(X))


def test_a_weight_that_the_model_changes_is_named() -> None:
    class Changing(Merged):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.up.weight.mul_(0.5)
            return super().forward(x)

    model, other = Changing(), Changing()
    folded = fold(model, (X,))
    assert ("up.weight", "the model writes to it") in [(left.node, left.reason) for left in report_of(folded).left]
    assert not any("up.weight" in constant.weights for constant in report_of(folded).constants)
    with torch.no_grad():
        for _ in range(3):
            same(folded(X), other(X))


def test_what_checks_a_weight_still_does() -> None:
    class Checks(Merged):
        def forward(self, x: Tensor) -> Tensor:
            norm = self.base.weight.square().sum()
            torch.ops.aten._assert_async.msg(norm > 0, "the weight is gone")
            return super().forward(x) / norm

    model = Checks()
    folded = fold(model, (X,))
    with torch.no_grad():
        same(folded(X), model(X))
        model.base.weight.zero_()
        with pytest.raises(RuntimeError, match="the weight is gone"):
            folded(X)


# -- the policy ------------------------------------------------------------------------------------------------------


def test_what_would_grow_is_left() -> None:
    model = Quantised(64)
    x = torch.linspace(-1.0, 1.0, 128).reshape(2, 64)
    folded = fold(model, (x,), policy=Policy(small=0))
    assert folded is model
    assert any("times the memory of its weights" in left.reason for left in report_of(folded).left)
    grown = fold(model, (x,), policy=Policy(small=0, growth=4.0))
    assert report_of(grown).given == 64 * 64 * 4
    same(grown(x), model(x))


def test_what_the_policy_skips_is_left() -> None:
    policy = Policy(skip=lambda node: "add" in node.name)
    folded = fold(Merged(), (X,), policy=policy)
    report = report_of(folded)
    assert [left.reason for left in report.left] == ["the policy skips it"]
    assert [constant.weights for constant in report.constants] == [("down.weight", "up.weight")]
    same(folded(X), Merged()(X))


def test_all_constants_together_have_a_limit() -> None:
    model = nn.Sequential(Merged(), Merged())
    report = report_of(fold(model, (X,), policy=Policy(most=300)))
    assert len(report.constants) == 1
    assert any("Policy(most=300)" in left.reason for left in report.left)


def test_norms_can_be_left_alone() -> None:
    model = Convolved().eval()
    assert not report_of(fold(model, (IMAGE,), policy=Policy(norms=False))).constants


def test_a_norm_whose_convolution_has_other_uses_stays() -> None:
    class Twice(Convolved):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers[0](x)
            normed: Tensor = self.layers[1](y)
            return normed + y

    model = Twice().eval()
    assert fold(model, (IMAGE,)) is model


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_a_module_needs_example_inputs() -> None:
    with pytest.raises(hopkit.HopkitError, match=r"fold\(\) of a Merged was given no example inputs"):
        fold(Merged())


def test_a_graph_needs_metadata() -> None:
    with pytest.raises(hopkit.HopkitError, match="node 'sin' does not say what it gives"):
        fold(torch.fx.symbolic_trace(lambda x: torch.sin(x)))


def test_no_model_at_all() -> None:
    wrong: Any = "resnet"
    with pytest.raises(hopkit.HopkitError, match=r"fold\(\) expected a torch.nn.Module .*, got a str"):
        fold(wrong, (X,))


def test_a_report_of_something_else() -> None:
    with pytest.raises(hopkit.HopkitError, match=r"was given a Merged that `fold` did not make"):
        report_of(Merged())


@pytest.mark.parametrize("wrong", [{"growth": -1.0}, {"small": "1 MB"}, {"most": True}])
def test_a_policy_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a number that is not negative"):
        Policy(**wrong)


def test_a_report_is_data() -> None:
    told = {"constants": (), "left": (), "moved": 0, "taken": 0, "released": (), "given": 0}
    assert FoldReport((), (), 0, 0).as_json() == told
