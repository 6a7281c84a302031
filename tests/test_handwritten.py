"""Rules that an author writes: kernels, and derivatives; called in plain eager, and right where something records."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
from hopkit.extend import Call, CaptureError, Decline, RuleError
from hopkit.extend.functionalize import Functionalizer, pure
from hopkit.extend.proxy import Tracer, node, trace
from hopkit.kit import fresh


@pytest.fixture(autouse=True)
def host() -> Iterator[None]:
    with fresh():
        yield


Scaled = hopkit.Op[..., Tensor]


@pytest.fixture
def op() -> Scaled:
    @hopkit.define("t_scaled")
    def scaled(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Tensor:
        return scale * body(x)

    return scaled


def sevens(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Tensor:
    return torch.full_like(x, 7)


def gradients(f: Callable[[], Tensor], *wrt: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f().sum(), wrt)


# Kernels


def test_a_kernel_is_called_in_plain_eager(op: Scaled) -> None:
    calls = []

    @op.rule("device")
    def kernel(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Tensor:
        calls.append(scale)
        return body(x) * scale

    x = torch.rand(3)
    torch.testing.assert_close(op(torch.sin, x, 3.0), 3 * x.sin())
    assert calls == [3.0]


def test_the_derivative_of_a_kernel_is_the_body_s_captures_included(op: Scaled) -> None:
    calls = []

    @op.rule("device", device="cpu")
    def kernel(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return (body(x) * scale).detach()

    x, w = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    found = gradients(lambda: op(lambda y: y.sin() * w, x), x, w)
    assert len(calls) == 1
    torch.testing.assert_close(found, gradients(lambda: 2 * x.sin() * w, x, w))


def test_a_kernel_that_disagrees_with_the_body_is_used_as_it_is(op: Scaled) -> None:
    op.rule("device")(sevens)
    x = torch.rand(3, requires_grad=True)
    result = op(torch.sin, x)
    assert result.tolist() == [7, 7, 7]
    torch.testing.assert_close(gradients(lambda: result, x), gradients(lambda: 2 * x.sin(), x))


def test_a_kernel_with_its_fake_rule_may_do_what_fakes_cannot(op: Scaled) -> None:
    @op.rule("device")
    def kernel(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Tensor:
        return torch.tensor([scale * value for value in body(x).tolist()])

    @op.rule("fake")
    def fake(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Tensor:
        return torch.empty_like(x)

    x = torch.rand(3)
    torch.testing.assert_close(op(torch.sin, x), 2 * x.sin())
    graph = make_fx(lambda x: op(torch.sin, x), tracing_mode="fake")(x)
    (call,) = [n for n in graph.graph.nodes if n.target is torch.ops.higher_order.t_scaled]
    assert call.target is op.operator
    torch.testing.assert_close(graph(x), 2 * x.sin())


def test_a_kernel_is_not_asked_under_a_transform(op: Scaled) -> None:
    op.rule("device")(sevens)
    xs = torch.rand(4, 3)
    torch.testing.assert_close(torch.vmap(lambda x: op(torch.sin, x))(xs), 2 * xs.sin())


def test_a_decomposed_op_asks_no_rule(op: Scaled) -> None:
    op.rule("device")(sevens)
    x = torch.rand(3)
    with hopkit.decompose(op):
        torch.testing.assert_close(op(torch.sin, x), 2 * x.sin())


# Derivatives


class Doubling:
    """The derivative of ``scale * body(x)``, times two, so that it is told from the derived one."""

    @staticmethod
    def forward(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> tuple[Tensor, object]:
        return scale * body(x), {"x": x, "scale": scale, "nothing": None}

    @staticmethod
    def backward(saved: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        assert saved["nothing"] is None
        return [2 * gradient * saved["scale"] * saved["x"].cos()]


def test_a_derivative_gets_what_forward_saved(op: Scaled) -> None:
    op.rule("autograd")(Doubling)
    x = torch.rand(3, requires_grad=True)
    torch.testing.assert_close(op(torch.sin, x), 2 * x.sin())
    (found,) = gradients(lambda: op(torch.sin, x, 3.0), x)
    torch.testing.assert_close(found, 2 * 3 * x.cos())


def test_without_gradients_the_op_itself_runs(op: Scaled) -> None:
    op.rule("autograd")(SimpleNamespace(forward=lambda body, x, scale=2.0: 1 / 0, backward=Doubling.backward))
    x = torch.rand(3, requires_grad=True)
    torch.testing.assert_close(op(torch.sin, x.detach()), 2 * x.detach().sin())
    with torch.no_grad():
        torch.testing.assert_close(op(torch.sin, x), 2 * x.sin())


def test_a_capture_without_a_gradient_is_an_error_that_names_it(op: Scaled) -> None:
    op.rule("autograd")(Doubling)
    x, weight = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    with pytest.raises(CaptureError, match=r"t_scaled.*no gradient for 'weight', which subgraph 'body' closes over"):
        gradients(lambda: op(lambda y: y.sin() * weight, x), x)


def test_a_capture_that_needs_no_gradient_is_no_error(op: Scaled) -> None:
    op.rule("autograd")(Doubling)
    x, ones = torch.rand(3, requires_grad=True), torch.ones(3)
    (found,) = gradients(lambda: op(lambda y: y.sin() * ones, x), x)
    torch.testing.assert_close(found, 4 * x.cos())


def test_gradients_of_captures_follow_those_of_the_operands(op: Scaled) -> None:
    class WithCaptures:
        @staticmethod
        def forward(body: Any, x: Tensor, scale: float = 2.0) -> tuple[Tensor, object]:
            (w,) = body.captures
            return scale * body(x), (x, w, scale)

        @staticmethod
        def backward(saved: Any, gradient: Tensor) -> Sequence[Tensor | None]:
            x, w, scale = saved
            return [gradient * scale * w * x.cos(), gradient * scale * x.sin()]

    op.rule("autograd")(WithCaptures)
    x, w = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    found = gradients(lambda: op(lambda y: y.sin() * w, x), x, w)
    torch.testing.assert_close(found, gradients(lambda: 2 * x.sin() * w, x, w))


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_gradients_is_an_error(op: Scaled, count: int) -> None:
    op.rule("autograd")(SimpleNamespace(forward=Doubling.forward, backward=lambda saved, g: [g] * count))
    x = torch.rand(3, requires_grad=True)
    with pytest.raises(RuleError, match=f"op 't_scaled' backward gave {count} gradients.*return 1: one per operand"):
        gradients(lambda: op(torch.sin, x), x)


def test_a_forward_that_saves_nothing_is_an_error(op: Scaled) -> None:
    op.rule("autograd")(SimpleNamespace(forward=lambda body, x, scale=2.0: body(x), backward=Doubling.backward))
    with pytest.raises(RuleError, match=r"forward gave a Tensor.*return `\(out, saved\)`"):
        op(torch.sin, torch.rand(3, requires_grad=True))


def test_a_rule_may_differentiate_the_call_itself(op: Scaled) -> None:
    calls = []

    @op.rule("autograd")
    def rule(call: Call) -> object:
        calls.append(call.op.name)
        return call.run()

    x = torch.rand(3, requires_grad=True)
    torch.testing.assert_close(gradients(lambda: op(torch.sin, x), x), gradients(lambda: 2 * x.sin(), x))
    assert calls == ["t_scaled"]


# Second derivatives: right, or an error


def second(op: Scaled) -> tuple[Tensor, Tensor]:
    x = torch.rand(3, requires_grad=True)
    (first,) = torch.autograd.grad(op(torch.sin, x).sum(), x, create_graph=True)
    # The other part has a history: a first part that lost its own would be left out without a word.
    (again,) = torch.autograd.grad((first + x).sum(), x)
    return x, again - 1


def test_a_rule_that_saves_inputs_is_differentiated_again(op: Scaled) -> None:
    op.rule("autograd")(Doubling)
    x, found = second(op)
    torch.testing.assert_close(found, -4 * x.sin())


def test_a_rule_that_saves_what_it_computed_is_not(op: Scaled) -> None:
    class Computed:
        @staticmethod
        def forward(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> tuple[Tensor, object]:
            return scale * body(x), x.cos()

        @staticmethod
        def backward(saved: Any, gradient: Tensor) -> Sequence[Tensor | None]:
            return [2 * gradient * saved]

    op.rule("autograd")(Computed)
    with pytest.raises(RuntimeError, match="forward saved what is neither an input nor an output"):
        second(op)


class Hiding:
    """Saves an object of its own, which holds a tensor."""

    @staticmethod
    def forward(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> tuple[Tensor, object]:
        return scale * body(x), SimpleNamespace(cos=x.cos())

    @staticmethod
    def backward(saved: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        return [2 * gradient * saved.cos]


def test_nor_one_that_hides_tensors_in_an_object_of_its_own(op: Scaled) -> None:
    op.rule("autograd")(Hiding)
    x = torch.rand(3, requires_grad=True)
    torch.testing.assert_close(gradients(lambda: op(torch.sin, x), x), (2 * x.cos(),))
    with pytest.raises(RuntimeError, match="forward saved what is neither an input nor an output"):
        second(op)


def test_a_derivative_is_used_where_a_recorded_graph_is_differentiated(op: Scaled) -> None:
    op.rule("autograd")(Doubling)
    graph = make_fx(lambda x: torch.autograd.grad(op(torch.sin, x).sum(), x)[0])(torch.rand(3, requires_grad=True))
    x = torch.rand(3)
    torch.testing.assert_close(graph(x), 4 * x.cos())


@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_a_derivative_between_two_functionalizations(op: Scaled, remove: Any) -> None:
    op.rule("autograd")(Doubling)

    def slope(x: Tensor) -> Tensor:
        inside = torch.func.functionalize(lambda x: op(torch.sin, x), remove=remove)
        return cast("Tensor", torch.func.grad(lambda x: inside(x).sum())(x))

    x = torch.rand(3)
    torch.testing.assert_close(torch.func.functionalize(slope, remove=remove)(x), 4 * x.cos())


# Batches: the derivative is that of every item


class Weighed:
    """The derivative of ``body(x) * w``, times three; what it saves is an input, an output and neither."""

    @staticmethod
    def forward(body: hopkit.Subgraph, x: Tensor, w: Tensor) -> tuple[Tensor, object]:
        y = body(x) * w
        return y, (w, y, x.cos())

    @staticmethod
    def backward(saved: Any, gradient: Tensor) -> Sequence[Tensor | None]:
        w, y, cos = saved
        return [3 * gradient * cos * w, 3 * gradient * y / w]


class WeighedFunction(torch.autograd.Function):
    """The same, as torch has it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin() * w, x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[1], *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: object) -> Any:
        return tuple(Weighed.backward(ctx.saved_tensors, gradient))


BATCHES: dict[str, tuple[Callable[[Any], Callable[[Tensor, Tensor], Tensor]], tuple[int, ...], tuple[int, ...]]] = {
    "both": (torch.vmap, (4, 3), (4, 3)),
    "one": (partial(torch.vmap, in_dims=(1, None)), (3, 4), (3,)),
    "two levels": (lambda f: partial(torch.vmap, in_dims=(2, 1))(torch.vmap(f, (None, 0))), (3, 1, 4), (5, 4, 3)),
}
DIFFERENTIATED: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "backward": lambda f, x, w: gradients(lambda: f(x, w), x, w),
    "grad": lambda f, x, w: torch.func.grad(lambda x, w: f(x, w).sum(), argnums=(0, 1))(x.detach(), w.detach()),
    "recorded": lambda f, x, w: make_fx(lambda x, w: gradients(lambda: f(x, w), x, w))(x, w)(x, w),
    "compiled": lambda f, x, w: gradients(partial(torch.compile(f, backend="aot_eager"), x, w), x, w),
    "inductor": lambda f, x, w: gradients(partial(torch.compile(f), x, w), x, w),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's, of its own code
@pytest.mark.parametrize(
    ("batch", "how"),
    [*itertools.product(BATCHES, [how for how in DIFFERENTIATED if how != "inductor"]), ("two levels", "inductor")],
)
def test_a_derivative_of_a_batch(batch: str, how: str) -> None:
    @hopkit.define("t_weighed")
    def weighed(body: hopkit.Subgraph, x: Tensor, w: Tensor) -> Tensor:
        return body(x) * w

    weighed.rule("autograd")(Weighed)
    batched, *shapes = BATCHES[batch]
    x, w = (torch.rand(shape).add_(0.5).requires_grad_() for shape in shapes)
    found = DIFFERENTIATED[how](batched(lambda x, w: weighed(torch.sin, x, w)), x, w)
    wanted = gradients(lambda: batched(lambda x, w: WeighedFunction.apply(x, w)[0])(x, w), x, w)  # type: ignore[no-untyped-call] # torch's
    torch.testing.assert_close(found, wanted)


def test_a_derivative_of_a_batch_is_differentiated_again_as_that_of_an_item(op: Scaled) -> None:
    op.rule("autograd")(Doubling)
    x = torch.rand(4, 3, requires_grad=True)
    (first,) = torch.autograd.grad(torch.vmap(lambda x: op(torch.sin, x))(x).sum(), x, create_graph=True)
    torch.testing.assert_close(gradients(lambda: first + x, x), (1 - 4 * x.sin(),))


@pytest.mark.parametrize("saves", [False, True])
def test_a_batch_of_what_gives_back_its_operand(saves: bool) -> None:
    @hopkit.define("t_back")
    def back(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return x

    class Back:
        @staticmethod
        def forward(body: hopkit.Subgraph, x: Tensor) -> tuple[Tensor, object]:
            return x, x.sin() if saves else x

        @staticmethod
        def backward(saved: Any, gradient: Tensor) -> list[Tensor]:
            return [gradient]

    back.rule("autograd")(Back)
    x = torch.rand(4, 3, requires_grad=True)
    torch.testing.assert_close(gradients(lambda: torch.vmap(lambda x: back(torch.sin, x) * 2)(x), x), (2 + 0 * x,))


def test_what_closes_over_another_tensor_in_a_batch(op: Scaled) -> None:
    class Captured:
        @staticmethod
        def forward(body: Any, x: Tensor, scale: float = 2.0) -> tuple[Tensor, object]:
            return scale * body(x), (x, *body.captures)

        @staticmethod
        def backward(saved: Any, gradient: Tensor) -> Sequence[Tensor | None]:
            x, w = saved
            return [7 * gradient * w, 7 * gradient * x]

    op.rule("autograd")(Captured)
    x, w, v = (torch.rand(shape, requires_grad=True) for shape in ((4, 3), (3,), (4, 3)))
    found = gradients(lambda: torch.vmap(lambda x: op(lambda y: y * w, x))(x), x, w)
    torch.testing.assert_close(found, (7 * w.expand(4, 3), 7 * x.sum(0)))
    found = gradients(lambda: torch.vmap(lambda x, v: op(lambda y: y * v, x))(x, v), x, v)
    torch.testing.assert_close(found, (7 * v, 7 * x))


def test_an_object_cannot_be_saved_for_a_batch(op: Scaled) -> None:
    op.rule("autograd")(Hiding)
    with pytest.raises(RuleError, match=r"(?s)saved namespace.*under torch\.vmap.*save tensors and numbers"):
        torch.vmap(lambda x: op(torch.sin, x))(torch.rand(4, 3, requires_grad=True))


# Functionalize and proxy


def test_an_author_s_functionalize_and_proxy_rules_are_asked(op: Scaled) -> None:
    asked = []

    @op.rule("functionalize")
    def functionalize(layer: Functionalizer, call: Call) -> object:
        asked.append("functionalize")
        pure_call = call.replace(graphs=pure(layer, call), inputs=layer.unwrap_tensors(call.inputs))
        with layer.redispatch_to_next():
            outputs = pure_call()
            assert isinstance(outputs, tuple)
            return layer.wrap_tensors(outputs)

    @op.rule("proxy")
    def record(tracer: Tracer, call: Call) -> object:
        asked.append("proxy")
        (graph,), (examples,) = call.graphs, call.rehearsal.examples
        return node(tracer, call.replace(graphs=[trace(tracer, "mine", graph, examples)]))

    x = torch.rand(3)
    graph = make_fx(torch.func.functionalize(lambda x: op(torch.sin, x)))(x)
    assert asked == ["functionalize", "proxy"]
    assert [name for name, _ in graph.named_children()] == ["mine"]
    torch.testing.assert_close(graph(x), 2 * x.sin())
    asked.clear()
    torch.testing.assert_close(torch.func.functionalize(lambda x: op(torch.sin, x))(x), 2 * x.sin())
    assert asked == ["functionalize"]


# Results and arguments that do not match one to one


def test_a_rule_that_gives_more_than_the_body_is_an_error(op: Scaled) -> None:
    def pair(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Any:
        return x, x

    op.rule("fake")(pair)
    with pytest.raises(RuleError, match="2 leaves where it was recorded with 1"):
        make_fx(lambda x: op(torch.sin, x), tracing_mode="fake")(torch.ones(3))


def test_one_tensor_for_two_operands_gets_both_gradients() -> None:
    @hopkit.define("t_product")
    def product(body: hopkit.Subgraph, x: Tensor, y: Tensor) -> Tensor:
        return body(x) * y

    class Product:
        @staticmethod
        def forward(body: hopkit.Subgraph, x: Tensor, y: Tensor) -> tuple[Tensor, object]:
            return body(x) * y, (x, y)

        @staticmethod
        def backward(saved: tuple[Tensor, Tensor], gradient: Tensor) -> tuple[Tensor, Tensor]:
            x, y = saved
            return gradient * 2 * y, gradient * 2 * x

    product.rule("autograd")(Product)
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    (got,) = gradients(lambda: product(lambda t: t * 2, x, x), x)
    (want,) = gradients(lambda: x * 2 * x, x)
    torch.testing.assert_close(got, want)


# The short cut: where nothing records or differentiates, a kernel is called as it stands


def test_a_kernel_is_called_without_rehearsing_the_call(op: Scaled, monkeypatch: pytest.MonkeyPatch) -> None:
    op.rule("device", device="cpu")(sevens)
    monkeypatch.setattr("hopkit.record.Recorder.record", lambda self: pytest.fail("rehearsed"))
    with torch.no_grad():
        torch.testing.assert_close(op(torch.sin, torch.ones(2)), torch.full((2,), 7.0))


def test_a_kernel_may_ask_what_a_subgraph_closes_over(op: Scaled) -> None:
    seen: list[object] = []

    @op.rule("device")
    def kernel(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Tensor:
        seen.extend(getattr(body, "captures"))  # noqa: B009 # a subgraph has captures where a rule gets it
        return scale * body(x)

    w = torch.tensor([2.0, 3.0])
    with torch.no_grad():
        torch.testing.assert_close(op(lambda y: y * w, torch.ones(2)), 2 * w)
    assert len(seen) == 1
    assert seen[0] is w


def test_a_kernel_of_another_device_is_not_called(op: Scaled) -> None:
    op.rule("device", device="cuda")(sevens)
    with torch.no_grad():
        torch.testing.assert_close(op(torch.sin, torch.ones(2)), 2 * torch.ones(2).sin())


def test_a_kernel_that_declines_leaves_it_to_the_body(op: Scaled) -> None:
    @op.rule("device")
    def kernel(body: hopkit.Subgraph, x: Tensor, scale: float = 2.0) -> Tensor:
        raise Decline("not today")

    with torch.no_grad():
        torch.testing.assert_close(op(torch.sin, torch.ones(2)), 2 * torch.ones(2).sin())


BACKWARD = SimpleNamespace(forward=lambda body, x: (body(x), None), backward=lambda saved, gradient: NotImplemented)


def _batched(op: Callable[..., Tensor], x: Tensor) -> object:
    def run(x: Tensor) -> Tensor:
        return op(torch.sin, x)

    return make_fx(torch.vmap(run))(x[None])


WRONG: dict[str, tuple[str, Any, Callable[[Callable[..., Tensor], Tensor], object]]] = {
    "proxy": ("proxy", lambda tracer, call: "text", lambda op, x: make_fx(lambda x: op(torch.sin, x))(x)),
    "vmap": ("vmap", lambda info, in_dims, body, x: (x, 5), lambda op, x: _batched(op, x)),
    "backward": ("autograd", BACKWARD, lambda op, x: op(torch.sin, x).sum().backward()),
    "fake": ("fake", lambda body, x: "text", lambda op, x: make_fx(lambda x: op(torch.sin, x), tracing_mode="fake")(x)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_gives_something_else_is_told_of(name: str) -> None:
    mode, rule, call = WRONG[name]
    with pytest.raises(RuleError, match="gave"):
        call(_define_wrong(mode, rule), torch.ones(2, requires_grad=True))


COMPILED: dict[str, tuple[str, Any, Callable[[Callable[..., Tensor], Tensor], object]]] = {
    "dynamo": ("dynamo", lambda frame, op: "text", lambda op, x: torch.compile(lambda x: op(torch.sin, x))(x)),
    "inductor": ("inductor", lambda call: call.inputs[0], lambda op, x: torch.compile(lambda x: op(torch.sin, x))(x)),
}


@pytest.mark.filterwarnings("ignore:Please add support for subgraph args", "ignore:.*torch.jit.script")  # torch's own
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiler_s_rule_that_gives_something_else_is_told_of(name: str) -> None:
    mode, rule, call = COMPILED[name]
    with pytest.raises(RuntimeError, match=r"RuleError: .*op 't_wrong'.* gave"):  # torch passes it on as its own
        call(_define_wrong(mode, rule), torch.ones(2, requires_grad=True))


def _define_wrong(mode: str, rule: object) -> Callable[..., Tensor]:
    @hopkit.define("t_wrong")
    def wrong(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x)

    wrong.rule(mode)(rule)
    return wrong


def test_a_backward_may_give_its_gradients_one_by_one() -> None:
    @hopkit.define("t_lazy")
    def lazy(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x)

    rule: Any = SimpleNamespace(
        forward=lambda body, x: (body(x), None), backward=lambda saved, gradient: (g * 7 for g in [gradient])
    )
    lazy.rule("autograd")(rule)
    x = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(lazy(torch.sin, x).sum(), x)
    assert torch.equal(gradient, torch.full((2,), 7.0))
