"""What torch's own ``run_const_graph`` cannot do, and hopkit's can; every value is compared with the graph's own."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import cast

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped] # torch's own
from torch.autograd import forward_ad
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import hopkit
from hopkit._torch.fakes import FakeMode
from hopkit.testing import check
from hopkit_constgraph import run_const_graph, run_const_graph_derive
from tests.modes import Boxed

Function = Callable[..., object]
THEIRS = torch.ops.higher_order.run_const_graph

torch_scripts_its_derivatives = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def weight() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, 6).reshape(2, 3)


def scaled(w: torch.Tensor) -> torch.Tensor:
    return w.sin() * 2


def gram(w: torch.Tensor) -> torch.Tensor:
    return w @ w.t()


class Scale(torch.nn.Module):
    """A graph with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.linspace(1.0, 2.0, 3))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return (w * self.factor).sin()


def ahead(function: Function) -> Function:
    """AOTAutograd, with the graph run as it is."""

    def boxed(graph: GraphModule, inputs: object) -> Function:
        return cast("Function", make_boxed_func(graph.forward))

    return cast("Function", aot_function(function, fw_compiler=boxed))


def functional_graph(function: Function) -> Function:
    def run(*inputs: torch.Tensor) -> object:
        examples = [t.detach().clone() for t in inputs]
        return make_fx(torch.func.functionalize(function))(*examples)(*inputs)

    return run


# Any number of calls


def test_several_calls_in_one_trace() -> None:
    first, second = symbolic_trace(scaled), symbolic_trace(gram)

    def run(w: torch.Tensor) -> object:
        return run_const_graph(first, (w,)), run_const_graph(second, (w,)), run_const_graph(first, (w + 1,))

    graph = make_fx(run)(torch.zeros(2, 3))
    assert dict(graph.named_children()) == {"_const_graph": first, "_const_graph_1": second}
    w = weight()
    torch.testing.assert_close(graph(w), (scaled(w), gram(w), scaled(w + 1)))
    with pytest.raises(AssertionError, match="_const_graph"):
        make_fx(lambda w: (THEIRS(first, (w,)), THEIRS(first, (w,))))(w)


def test_a_graph_with_it_copies_and_pickles() -> None:
    inner = symbolic_trace(lambda w: scaled(w))  # without annotations, which torch.fx keeps as text and cannot pickle
    graph = make_fx(lambda w: run_const_graph(inner, (w,)))(torch.zeros(2, 3))
    for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(twin(weight()), scaled(weight()))


# Devices and operands


def test_meta_device() -> None:
    result = run_const_graph(symbolic_trace(gram), (weight().to("meta"),))
    assert isinstance(result, torch.Tensor)
    assert (result.device.type, result.shape) == ("meta", (2, 2))


def test_no_tensor_among_the_arguments() -> None:
    graph = symbolic_trace(lambda size, value: torch.full((size,), value))
    run = make_fx(lambda: run_const_graph(graph, (3, 1.5)))()
    for result in (run_const_graph(graph, (3, 1.5)), run()):
        torch.testing.assert_close(result, torch.full((3,), 1.5))


def test_fake_tensors_in_nested_arguments_outside_of_their_mode() -> None:
    graph, mode = symbolic_trace(lambda both: both[0] @ both[1]), FakeMode()
    fakes = mode.from_tensor(weight()), mode.from_tensor(weight().t())
    recorded = make_fx(lambda *both: run_const_graph(graph, (both,)))(*fakes)
    for result in (run_const_graph(graph, (fakes,)), recorded(*fakes)):
        assert isinstance(result, type(fakes[0]))
        assert result.shape == (2, 2)
    with pytest.raises(TypeError, match="not supported for the given input types"):
        THEIRS(graph, (fakes,))


def test_a_subclass_in_nested_arguments() -> None:
    graph, boxed = symbolic_trace(lambda both: both[0] * both[1]), Boxed(weight())
    result = run_const_graph(graph, ((boxed, 2.0),))
    assert isinstance(result, Boxed)
    torch.testing.assert_close(result.held, weight() * 2)
    with pytest.raises(TypeError, match="not supported for the given input types"):
        THEIRS(graph, ((boxed, 2.0),))


def test_a_subclass_is_recorded_inside() -> None:
    """torch's op records a node, which no subclass can run."""
    graph, boxed = symbolic_trace(scaled), Boxed(weight())
    torch.testing.assert_close(make_fx(lambda w: run_const_graph(graph, (w,)))(boxed)(boxed).held, scaled(weight()))
    with pytest.raises(NotImplementedError, match="There was no rule registered"):
        make_fx(lambda w: THEIRS(graph, (w,)))(boxed)(boxed)


@dataclasses.dataclass
class Affine:
    weight: torch.Tensor
    bias: torch.Tensor


torch.export.register_dataclass(Affine)


@pytest.mark.parametrize("record", [ahead, functional_graph])
def test_a_dataclass_among_the_arguments(record: Callable[[Function], Function]) -> None:
    graph = symbolic_trace(lambda affine: affine.weight * 2 + affine.bias)

    def run(weight: torch.Tensor, bias: torch.Tensor) -> object:
        return run_const_graph(graph, (Affine(weight, bias),))

    inputs = weight(), weight().exp()
    torch.testing.assert_close(record(run)(*inputs), run(*inputs))
    with pytest.raises(TypeError, match="unhashable"):
        ahead(lambda weight, bias: THEIRS(graph, (Affine(weight, bias),)))(*inputs)


def test_a_schema_has_one_argument_per_leaf() -> None:
    graph = symbolic_trace(lambda both, scale: both[0] * scale + both[1])
    args = (graph, ([weight(), weight()], 2.0))
    schema = "constgraph_run(Any graph0, Tensor input0, Tensor input1, float input2) -> ((Tensor))"
    assert str(torch.ops.higher_order.constgraph_run.gen_schema(*args)) == schema
    with pytest.raises(NotImplementedError, match="does not implement a gen_schema"):
        THEIRS.gen_schema(*args)


def test_nested_arguments_in_a_program_that_is_saved() -> None:
    graph = make_fx(lambda both: both[0] + both[1])([weight(), weight()])

    class Both(torch.nn.Module):
        def __init__(self, op: Function) -> None:
            super().__init__()
            self.op = op

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> object:
            return self.op(graph, ([left, right],))

    def loaded(op: Function) -> Function:
        file = io.BytesIO()
        torch.export.save(torch.export.export(Both(op), (weight(), weight()), strict=False), file)
        file.seek(0)
        return torch.export.load(file).module()

    inputs = weight(), weight().exp()
    torch.testing.assert_close(loaded(run_const_graph)(*inputs), inputs[0] + inputs[1])
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        loaded(THEIRS)(*inputs)


@pytest.mark.parametrize("bad", [torch.sin, scaled, torch.nn.Linear(3, 3), None])
@pytest.mark.parametrize("call", [run_const_graph, torch.ops.higher_order.constgraph_run], ids=["op", "operator"])
def test_what_is_no_graph_module_is_a_type_error(call: Function, bad: object) -> None:
    message = r"constgraph_run\(\) argument 'graph' expected a torch.fx.GraphModule, got"
    with pytest.raises(TypeError, match=message):
        call(bad, (weight(),))
    with pytest.raises(hopkit.CallError, match=message):
        make_fx(lambda w: call(bad, (w,)))(weight())


# Derivatives and transforms


@torch_scripts_its_derivatives
def test_forward_mode() -> None:
    graph, w, direction = symbolic_trace(scaled), weight(), weight().exp()
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(
            cast("torch.Tensor", run_const_graph(graph, (forward_ad.make_dual(w, direction),)))
        )
        lost = forward_ad.unpack_dual(THEIRS(graph, (forward_ad.make_dual(w, direction),))).tangent
    torch.testing.assert_close(primal, scaled(w))
    torch.testing.assert_close(tangent, w.cos() * 2 * direction)
    assert lost is None


def test_a_graph_that_stops_gradients_asks_for_none() -> None:
    graph, args = symbolic_trace(lambda w: w.detach() * 3), (weight().requires_grad_(),)
    assert not cast("torch.Tensor", run_const_graph(graph, args)).requires_grad
    assert THEIRS(graph, args).requires_grad


@torch_scripts_its_derivatives
def test_transforms() -> None:
    graph, w = symbolic_trace(scaled), weight()

    def run(w: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", run_const_graph(graph, (w,)))

    batch = torch.stack([w, w.exp()])
    torch.testing.assert_close(torch.vmap(run)(batch), scaled(batch))
    torch.testing.assert_close(torch.func.grad(lambda w: run(w).sum())(w), w.cos() * 2)
    torch.testing.assert_close(torch.func.jvp(run, (w,), (w,))[1], w.cos() * 2 * w)
    torch.testing.assert_close(torch.vmap(torch.func.grad(lambda w: run(w).sum()))(batch), batch.cos() * 2)


def test_a_parameter_of_the_graph_has_no_gradient_either() -> None:
    """torch's op drops it without a word; here backward raises, as it does for a weight."""
    graph = symbolic_trace(Scale())
    assert not THEIRS(graph, (weight(),)).requires_grad
    result = cast("torch.Tensor", run_const_graph(graph, (weight(),)))
    with pytest.raises(RuntimeError, match="Autograd not implemented for constgraph_run"):
        result.sum().backward()


def test_flops_inside_are_counted() -> None:
    graph = symbolic_trace(gram)
    with FlopCounterMode(display=False) as counter:
        result = run_const_graph(graph, (weight(),))
    assert counter.get_total_flops() == 2 * 2 * 3 * 2
    torch.testing.assert_close(result, gram(weight()))


# Graphs that write


def writes_to_argument() -> GraphModule:
    def write(w: torch.Tensor) -> torch.Tensor:
        w.add_(1)
        return w * 2

    return make_fx(write)(torch.zeros(2, 3))


def two_reads(graph: GraphModule) -> Function:
    """Reads before and after the call what the call writes to."""

    def run(w: torch.Tensor) -> object:
        local = w + 0
        before = local.clone()
        result = run_const_graph(graph, (local,))
        return before, result, local * 3

    return run


@pytest.mark.parametrize("record", [ahead, functional_graph])
def test_a_graph_that_writes_to_an_argument_is_taken_apart(record: Callable[[Function], Function]) -> None:
    run = two_reads(writes_to_argument())
    with pytest.warns(hopkit.HopkitWarning, match="not kept in the graph.*writes to operand 'args'"):
        result = record(run)(weight())
    torch.testing.assert_close(tuple(cast("list[object]", result)), run(weight()))


def test_no_node_is_left_of_a_graph_that_writes_to_an_argument() -> None:
    with pytest.warns(hopkit.HopkitWarning):
        graph = make_fx(torch.func.functionalize(two_reads(writes_to_argument())))(torch.zeros(2, 3))
    assert "constgraph_run" not in graph.code
    assert "aten.add_" not in graph.code


def test_a_graph_that_writes_to_its_own_buffer_is_taken_apart() -> None:
    class Sums(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total = torch.nn.Buffer(torch.zeros(3))

        def forward(self, w: torch.Tensor) -> torch.Tensor:
            self.total.add_(w.sum(0))
            return w + self.total

    module = Sums()
    with pytest.warns(hopkit.HopkitWarning, match="'total', which subgraph 'graph' closes over"):
        recorded = make_fx(lambda w: run_const_graph(symbolic_trace(module), (w,)))(weight())
    module.total.zero_()
    assert "constgraph_run" not in recorded.code
    torch.testing.assert_close(recorded(weight()), weight() + weight().sum(0))
    torch.testing.assert_close(recorded(weight()), weight() + 2 * weight().sum(0))


def test_strictly_a_graph_that_writes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPKIT_STRICT", "1")
    with pytest.raises(hopkit.PropertyError, match="writes to operand 'args'"):
        make_fx(two_reads(writes_to_argument()))(weight())


def test_deriving_sees_what_is_written_to_a_weight_that_comes_back() -> None:
    """`run_const_graph` does not, see test_seed.py: its node stays, as torch's does."""
    graph = symbolic_trace(lambda w: w)

    def run(w: torch.Tensor) -> torch.Tensor:
        cast("torch.Tensor", run_const_graph_derive(graph, (w,))).add_(1)
        return w * 1

    torch.testing.assert_close(functional_graph(run)(weight()), weight() + 1)


# autograd="derive"


def gradients(function: Function, w: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    loss = cast("torch.Tensor", function(w)).square().sum()
    return torch.autograd.grad(loss, [w, factor], create_graph=True)


def second(function: Function, w: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = sum(g.square().sum() for g in gradients(function, w, factor))
    return torch.autograd.grad(cast("torch.Tensor", total), [w, factor])


@pytest.mark.parametrize("order", [gradients, second])
def test_gradients_of_arguments_and_of_own_parameters(order: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    module = Scale()
    graph = symbolic_trace(module)

    def run(w: torch.Tensor) -> object:
        return run_const_graph_derive(graph, (w,))

    w = weight().requires_grad_()
    expected = order(module, w, module.factor)
    step = make_fx(lambda w: order(run, w, module.factor))(torch.ones(2, 3, requires_grad=True))
    recorded = make_fx(run)(torch.zeros(2, 3))
    for found in (order(run, w, module.factor), step(w), order(recorded, w, module.factor)):
        torch.testing.assert_close(found, expected)


# Every mode


def test_nested_arguments_in_every_mode() -> None:
    """Of the op that derives; test_seed.py has the other one."""
    graph = symbolic_trace(lambda both, named: both[0] * both[1] + named["w"])
    report = check(run_const_graph_derive, [hopkit.Sample((graph, ((weight(), 2.0), {"w": weight()})))])
    assert report.ok, str(report)


@pytest.mark.parametrize("op", [run_const_graph, run_const_graph_derive], ids=["", "derive"])
def test_every_mode_on_real_models(op: hopkit.Op[..., object]) -> None:
    report = check(op)
    assert report.ok, str(report)
