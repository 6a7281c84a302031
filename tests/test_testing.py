"""``hopkit.testing``: what is right is called right, what is wrong is called wrong, and nothing passes uncompared."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hopkit
from hopkit import Sample, Subgraph
from hopkit._torch import trees
from hopkit.extend import OpSpec, PluginError, Rule, hookimpl
from hopkit.kit import Kit
from hopkit.testing import Case, Cell, Column, Group, Outcome, Report, check, fresh, outcome, outcome_of_class, plan
from hopkit.testing.columns import COLUMNS
from hopkit.testing.compare import Pair, difference

pytest_plugins = ["pytester"]

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


@pytest.fixture(autouse=True)
def host() -> Iterator[Kit]:
    with fresh() as host:
        yield host


def define_twice(name: str = "demo_twice") -> hopkit.Op[..., torch.Tensor]:
    @hopkit.define(name)
    def twice(body: Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return scale * body(body(x))

    return twice


def only(op: hopkit.Op[..., object], sample: Sample, mode: str) -> Cell:
    (cell,) = (cell for cell in check(op, [sample], modes=[mode]).cells if cell.mode == mode)
    return cell


# What is right


@pytest.mark.parametrize("mode", [mode for mode in COLUMNS if mode != "conj"])
def test_an_op_with_no_rule_of_its_own_is_right(mode: str) -> None:
    cell = only(define_twice(), Sample((torch.sin, X)), mode)
    assert (cell.verdict, cell.note) == ("right", cell.note), cell
    assert cell.error is not None
    assert cell.error < 1e-6


def test_complex_operands_are_conjugated_lazily() -> None:
    assert only(define_twice(), Sample((torch.sin, torch.complex(X, X))), "conj").verdict == "right"


@pytest.mark.parametrize("mode", ["grad", "gradgrad", "compiled_grad"])
def test_the_gradients_of_captures_are_compared(mode: str) -> None:
    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
    assert only(define_twice(), Sample((lambda y: (y * weight).sin(), X)), mode).verdict == "right"


def test_a_note_says_whether_the_op_is_a_node() -> None:
    assert only(define_twice(), Sample((torch.sin, X)), "twice").note == "kept, 2 nodes"


def test_a_decomposed_call_is_right_and_says_why() -> None:
    @hopkit.define("demo_once")
    def once(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)

    cell = only(once, Sample((torch.t, X)), "make_fx_real")
    assert cell.verdict == "right"
    assert cell.note.startswith("decomposed; op 'demo_once' is not kept in the graph")


def test_a_sample_keeps_one_tensor_in_two_places_one() -> None:
    @hopkit.define("demo_same")
    def same(body: Subgraph, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return body(x) if x is y else -body(x)

    assert only(same, Sample((torch.sin, X, X)), "make_fx_real").verdict == "right"


def test_random_numbers_are_drawn_alike() -> None:
    @hopkit.define("demo_noise", random=True)
    def noise(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x) + torch.rand_like(x)

    state = torch.get_rng_state()
    assert only(noise, Sample((torch.sin, X)), "eager").verdict == "right"
    assert torch.equal(state, torch.get_rng_state())


# What is wrong


def test_a_fake_rule_with_another_shape_is_wrong() -> None:
    twice = define_twice()

    @twice.rule("fake")
    def written(body: Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x.new_empty(x.shape[0])

    cell = only(twice, Sample((torch.sin, X)), "fake")
    assert (cell.verdict, cell.note) == ("wrong", "the result has shape (4,), not (4, 3)")


def test_a_fake_rule_with_other_strides_is_wrong() -> None:
    twice = define_twice()

    @twice.rule("fake")
    def written(body: Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x.new_empty((3, 4)).t()

    cell = only(twice, Sample((torch.sin, X)), "fake")
    assert (cell.verdict, cell.note) == ("wrong", "the result has strides (1, 4), not (3, 1)")


def test_a_device_kernel_with_another_value_is_wrong_everywhere_it_runs() -> None:
    twice = define_twice()

    @twice.rule("device", device="cpu")
    def written(body: Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return scale * body(x)

    report = check(twice, [Sample((torch.sin, X))], modes=["eager", "make_fx_real"])
    assert [cell.verdict for cell in report.cells] == ["wrong", "wrong"]
    assert not report.ok


class Halved:
    """A derivative that gives half of the gradient."""

    @staticmethod
    def forward(body: Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor, object]:
        return scale * body(body(x)), x

    @staticmethod
    def backward(saved: object, *gradients: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        return [g if g is None else g / 2 for g in gradients]


@pytest.mark.parametrize("mode", ["grad", "training", "aot_grad"])
def test_a_vjp_with_another_gradient_is_wrong(mode: str) -> None:
    twice = define_twice()
    twice.rule("autograd")(Halved)
    cell = only(twice, Sample((lambda y: y * 1.0, X)), mode)
    assert cell.verdict == "wrong"
    assert "gradient has values that are wrong" in cell.note


def test_an_operand_that_a_kernel_writes_to_is_wrong() -> None:
    twice = define_twice()

    @twice.rule("device")
    def written(body: Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return scale * body(body(x)) + x.zero_()

    cell = only(twice, Sample((torch.sin, X)), "eager")
    assert cell.verdict == "wrong"
    assert cell.note.startswith("an operand afterwards")


def test_a_result_of_another_structure_is_wrong() -> None:
    error, told = difference(Pair("the result", (X, X), X))
    assert told == "the result is ('Tensor[4, 3]', 'Tensor[4, 3]'), not 'Tensor[4, 3]'"
    assert error == math.inf


@pytest.mark.parametrize(
    ("got", "told"),
    [
        (X.double(), "the value has dtype torch.float64, not torch.float32"),
        (X.to("meta"), "the value has device meta, not cpu"),
        (X.to_sparse(), "the value has layout torch.sparse_coo, not torch.strided"),
        (X + 0.5, "the value has values that are wrong by 0.5"),
        (torch.where(X > 0, X, torch.nan), "the value has values that are wrong by inf"),
        (None, "the value has None, not 'Tensor[4, 3]'"),
    ],
)
def test_a_difference_is_told(got: object, told: str) -> None:
    assert difference(Pair("the value", got, X))[1] == told


def test_strides_of_sizes_below_two_say_nothing() -> None:
    assert not difference(Pair("the value", X[:1].t(), X[:1].t().contiguous()))[1]


# What has no answer


def test_an_error_of_the_op_alone_is_an_error() -> None:
    twice = define_twice()

    @twice.rule("device")
    def broken(body: Subgraph, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        raise KeyError("kernel")

    cell = only(twice, Sample((torch.sin, X)), "eager")
    assert (cell.verdict, cell.error, cell.note) == ("error", None, "KeyError: 'kernel'")


def test_a_mode_in_which_the_body_alone_fails_does_not_apply() -> None:
    @hopkit.define("demo_branch")
    def branch(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x) if x.sum() > 0 else x

    cell = only(branch, Sample((torch.sin, X)), "vmap")
    assert cell.verdict == "n/a"
    assert cell.note.startswith("the body alone cannot be run here")


def define_if() -> hopkit.Op[..., torch.Tensor]:
    """An op that decides on a value, and says what its subgraph gets and what the result is."""

    @hopkit.define("demo_if", inputs=lambda b, x: ((x,),), outputs=lambda b, x: torch.empty_like(x))
    def branch(b: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return b(x) if bool(x.sum() > 0) else x.clone()

    return branch


@pytest.mark.parametrize(("mode", "rule"), [("meta", "fake"), ("fake", "fake"), ("make_fx_fake", "proxy")])
def test_a_body_that_fails_is_no_excuse_where_its_op_declares_the_result(mode: str, rule: str) -> None:
    def broken(*_: object) -> object:
        raise KeyError("paint")

    branch = define_if()
    assert only(branch, Sample((torch.sin, X)), mode).verdict == "right"
    branch.rule(rule)(broken)
    cell = only(branch, Sample((torch.sin, X)), mode)
    assert (cell.verdict, cell.note) == ("error", "KeyError: 'paint'")


def test_a_graph_that_is_wrong_on_another_size_is_wrong_where_torch_has_none_of_the_body() -> None:
    branch = define_if()
    branch.rule("proxy")(lambda tracer, call: [torch.ones(4, 3)])
    assert only(branch, Sample((torch.sin, X)), "make_fx_symbolic").verdict == "wrong"


def test_a_subgraph_that_fails_by_itself_does_not_apply_whatever_is_declared() -> None:
    def decides(y: torch.Tensor) -> torch.Tensor:
        return y.sin() if y.sum() > 0 else y.cos()

    assert only(define_if(), Sample((decides, X)), "meta").verdict == "n/a"


def test_a_conflict_of_plugins_is_an_error_wherever_the_columns_get(host: Kit) -> None:
    class OnCuda:
        @hookimpl
        def hopkit_device_rule(self, op: OpSpec) -> Rule:
            return {"cuda": lambda body, x, *, scale: x}

    class OnFakes:
        @hookimpl
        def hopkit_fake_rule(self, op: OpSpec) -> Rule:
            return lambda body, x, *, scale: x

    for kind in (OnCuda, OnFakes):
        for name in ("left", "right"):
            host.plugins.register(kind(), f"{name} {kind.__name__}")
    report = check(define_twice(), [Sample((torch.sin, X))], modes=["eager", "fake"])
    verdicts = {(cell.mode, cell.sample): cell.verdict for cell in report.cells}
    assert verdicts == {
        ("device (cuda)", "any"): "error",
        ("fake", "any"): "error",
        ("eager", "0"): "right",
        ("fake", "0"): "error",
    }
    assert not report.ok


def test_a_refusal_names_the_op() -> None:
    @hopkit.define("demo_branch")
    def branch(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x) if x.sum() > 0 else x

    cell = only(branch, Sample((torch.sin, X)), "make_fx_fake")
    assert cell.verdict == "refused"
    assert "op 'demo_branch' cannot be recorded" in cell.note


def test_an_op_of_integers_has_no_gradient() -> None:
    cell = only(define_twice(), Sample((torch.neg, torch.arange(4))), "grad")
    assert (cell.verdict, cell.note) == ("n/a", "nothing in this sample has a gradient")


def test_a_result_with_nothing_in_it_is_not_right() -> None:
    @hopkit.define("demo_nothing")
    def nothing(body: Subgraph, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()

    cell = only(nothing, Sample((torch.sin, X)), "make_fx_fake")
    assert cell.verdict != "right"


# Autograd policies


@pytest.mark.parametrize(("policy", "where"), [("deferred_error", "in backward"), ("error", "at the call")])
def test_a_policy_must_raise_where_it_says(policy: hopkit.spec.AutogradPolicy, where: str) -> None:
    @hopkit.define("demo_policy", autograd=policy)
    def once(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)

    cell = only(once, Sample((torch.sin, X)), "grad")
    assert (cell.verdict, cell.note) == ("right", f'raises {where}, as autograd="{policy}" says')


def test_a_policy_that_a_rule_breaks_is_wrong() -> None:
    @hopkit.define("demo_policy", autograd="error")
    def once(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)

    once.rule("autograd")(lambda call: call.run())
    assert only(once, Sample((torch.sin, X)), "grad").verdict == "wrong"


# The report


def test_the_op_brings_its_samples() -> None:
    @hopkit.define("demo_own", samples=lambda: [Sample((torch.sin, X), name="first"), Sample((torch.cos, X))])
    def own(body: Subgraph, x: torch.Tensor) -> torch.Tensor:
        return body(x)

    assert [cell.sample for cell in check(own, modes=["eager"]).cells] == ["first", "1"]


def test_no_samples_is_an_error() -> None:
    with pytest.raises(hopkit.SpecError, match="op 'demo_twice' has no samples"):
        check(define_twice())


def test_a_group_stands_for_its_columns() -> None:
    columns = [
        trial.column.name for trial in plan(define_twice(), [Sample((torch.sin, X))], modes=["autograd", "fake"])
    ]
    assert columns == ["fake", "grad", "gradgrad", "forward_mode"]


def test_an_unknown_mode_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="there is no mode 'gard', did you mean 'grad'"):
        check(define_twice(), [Sample((torch.sin, X))], modes=["gard"])


def test_progress_is_told_before_every_cell() -> None:
    told: list[tuple[int, int, str]] = []
    check(define_twice(), [Sample((torch.sin, X))], modes=["eager", "fake"], progress=lambda *what: told.append(what))
    assert told == [(0, 2, "eager-0"), (1, 2, "fake-0")]


def test_a_report_prints_as_a_table() -> None:
    cells = (Cell("a", "first", "eager", "right", 0.0, 0.012), Cell("a", "first", "vmap", "n/a", None, 0.0, "no batch"))
    assert str(Report(cells)).splitlines() == [
        "mode   sample  verdict  error    time    note",
        "eager  first   right    0.0e+00  0.01 s",
        "vmap   first   n/a               0.00 s  no batch",
        "",
        "1 right, 1 n/a",
    ]


def test_a_report_as_data_has_finite_numbers() -> None:
    report = Report((Cell("a", "0", "eager", "wrong", float("inf"), 0.0, "other shape"),))
    assert report.as_json()["cells"] == [
        {
            "op": "a",
            "sample": "0",
            "mode": "eager",
            "verdict": "wrong",
            "error": None,
            "seconds": 0.0,
            "note": "other shape",
        }
    ]


@pytest.mark.parametrize("verdict", ["n/a", "refused"])
def test_a_report_in_which_nothing_was_compared_is_not_ok(verdict: hopkit.testing.Verdict) -> None:
    assert not Report((Cell("a", "0", "eager", verdict, None, 0.0),)).ok
    assert not Report(()).ok


# The pytest plugin


def test_the_pytest_plugin_loads_neither_torch_nor_hopkit() -> None:
    program = "import sys, pytest_hopkit; print(sorted({'torch', 'hopkit'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_a_test_per_cell(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import hopkit, pytest, torch

        x = torch.ones(3, 2)

        @hopkit.define("inner_twice", samples=lambda: [hopkit.Sample((torch.sin, x), name="sin")])
        def twice(body: hopkit.Subgraph, x: torch.Tensor) -> torch.Tensor:
            return body(body(x))

        @hopkit.define("inner_wrong", samples=lambda: [hopkit.Sample((torch.sin, x), name="sin")])
        def wrong(body: hopkit.Subgraph, x: torch.Tensor) -> torch.Tensor:
            return body(body(x))

        wrong.rule("fake")(lambda body, x: x[0])

        @pytest.mark.hopkit(op=twice, modes=["eager", "conj"])
        def test_twice(hopkit_cell):
            hopkit_cell()

        @pytest.mark.hopkit(op=wrong, modes=["fake"])
        def test_wrong(hopkit_cell):
            hopkit_cell()
        """
    )
    result = pytester.runpytest_subprocess("-rA", "--strict-markers")
    result.assert_outcomes(passed=1, skipped=1, failed=1)
    result.stdout.fnmatch_lines(["PASSED *::test_twice[[]eager-sin[]]"])
    result.stdout.fnmatch_lines(
        ["*op 'inner_wrong', sample sin, mode fake: wrong. the result has shape (2,), not (3, 2)"]
    )


def test_a_cell_without_an_op_is_a_mistake(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(hopkit_cell): hopkit_cell()")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*hopkit_cell needs @pytest.mark.hopkit(op=...) on the test"])


def test_a_host_for_one_test(hopkit_fresh: hopkit.kit.Kit) -> None:
    define_twice("demo_alone")
    assert list(hopkit_fresh.ops) == ["demo_alone"]


# Columns that plugins add


def adding(given: object) -> SimpleNamespace:
    return SimpleNamespace(hopkit_add_columns=hookimpl(lambda: given))


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "right"), (2.0, "wrong")])
def test_a_plugin_adds_a_column_for_every_op(factor: float, verdict: str) -> None:
    group = Group("mine")

    @group.column
    def scaled(case: Case, callee: Callable[..., object]) -> Outcome:
        return outcome(case, lambda *ts: trees.map_only(torch.Tensor, lambda t: t * factor, case.on(callee)(*ts)))

    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
    hopkit.register(adding(group.columns), "mine")
    for mode in ("mine", "scaled"):
        assert only(define_twice(f"demo_{mode}"), Sample((lambda y: y * weight, X)), "scaled").verdict == verdict
    assert check(hopkit.ops()["demo_mine"], [Sample((torch.sin, X))], modes=["mine"]).ok == (verdict == "right")
    hopkit.unregister("mine")
    with pytest.raises(ValueError, match="there is no mode 'scaled'"):
        plan(hopkit.ops()["demo_mine"], [Sample((torch.sin, X))], modes=["scaled"])


class Held(torch.Tensor):
    """Wraps a tensor."""

    held: torch.Tensor

    def __new__(cls, inner: torch.Tensor) -> Held:
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)
        self.held = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override] # torch's stub leaves out the operator
        plain = trees.map_leaves(unheld, (args, dict(kwargs or {})))
        return trees.map_only(torch.Tensor, Held, func(*plain[0], **plain[1]))


def unheld(value: Any) -> Any:
    return value.held if isinstance(value, Held) else value


@pytest.mark.parametrize(("body", "verdict"), [(torch.sin, "right"), (torch.Tensor.detach, "wrong")])
def test_a_column_of_a_tensor_class_compares_values_and_gradients(
    body: Callable[..., torch.Tensor], verdict: str
) -> None:
    group = Group("mine")

    @group.column
    def held(case: Case, callee: Callable[..., object]) -> Outcome:
        def run(*tensors: torch.Tensor) -> object:
            assert all(isinstance(t, Held) for t in tensors)
            return trees.map_only(torch.Tensor, lambda t: t + body(t) - torch.sin(t), case.on(callee)(*tensors))

        return outcome_of_class(case, run, Held, unheld)

    weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
    hopkit.register(adding(group.columns), "mine")
    assert only(define_twice(), Sample((lambda y: y * weight, X)), "held").verdict == verdict


@pytest.mark.parametrize(
    "given", [None, ["fake"], [Column("eager", "mine", lambda case, callee: Outcome([]))]], ids=repr
)
def test_what_is_no_column_is_refused(given: object) -> None:
    hopkit.register(adding(given), "mine")
    with pytest.raises(PluginError, match="plugin 'mine', hook 'hopkit_add_columns' gave"):
        check(define_twice(), [Sample((torch.sin, X))])
