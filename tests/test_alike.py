"""Equal calls of an outlined op are read and recorded once by Dynamo; calls that only look equal are not."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import hopkit
from hopkit import Subgraph
from tests.recording import same

pytestmark = pytest.mark.usefixtures("hopkit_fresh")

X = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)
COUNT = 1
SCALES: dict[nn.Module, float] = {}
FIRST: list[nn.Module] = []
IDS: list[int] = []
Through = Callable[[Any, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)


class Layer(nn.Module):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.0)
        self.eps = 0.1
        self.scale: Any = None
        self.others: list[list[nn.Module]] = []

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.drop(self.norm(self.linear(x))) + self.eps * x) * self.factor


class ByRegistry(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * SCALES[self]


class ByIdentity(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self is FIRST[0] else 3.0)


class ById(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if id(self) == IDS[0] else 3.0)


class ByPosition(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(1 + self.others[0].index(self))


class ByObject(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * cast("float", self.scale.value)


class ByTag(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * cast("float", cast("Any", self.linear.weight).tag)


class ByParts(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.left is self.right else 3.0)


class BySlot(Layer):
    __slots__ = ("value",)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * cast("float", self.value)


class ByGradient(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.linear.weight.grad is None else 3.0)


class Scaled(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales[-1]


class Doubled(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ByMode(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.drop.training else 3.0)


class Deep(nn.Module):
    def __init__(self, through: Through, layer: Callable[[], Layer] = Layer) -> None:
        super().__init__()
        self.through = through
        self.first = nn.Linear(4, 4)  # what the layers take is alike: computed, and with a gradient
        self.layers = nn.ModuleList(layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = self.through(layer, x)
        return x


class Captured(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        w = x * 2
        for layer in self.layers:
            x = self.through(lambda y, layer=layer, w=w: layer(y) + w, x)
            w = w.sin()
        return x


class Numbered(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for n, layer in zip((0.0, -0.0, 1.0), self.layers, strict=True):
            x = x + self.through(lambda y, n=n, layer=layer: torch.atan2(layer(y) * 0 + n, -y.square() - 1), x)
        return x


class Graded(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for n, layer in enumerate(self.layers):
            with torch.set_grad_enabled(n != 1):
                x = x + self.through(lambda y, layer=layer: layer(y) * (2 + torch.is_grad_enabled()), x)
        return x


class Cast(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for n, layer in enumerate(self.layers):
            with torch.autocast("cpu", enabled=n == 1, dtype=torch.bfloat16):
                x = self.through(lambda y, layer=layer: layer(y) * (2 + torch.is_autocast_enabled("cpu")), x)
        return x


class Written(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for n, layer in enumerate(self.layers):
            if n:
                cast("Any", layer).eps = float(n)
            x = self.through(layer, x)
        return x


class Writing(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.eps = self.eps + 1.0
        return super().forward(x)


class Global(Deep):
    def forward(self, x: Tensor) -> Tensor:
        global COUNT
        x = self.first(x)
        for n, layer in enumerate(self.layers):
            if n:
                COUNT = n + 1
            x = x + self.through(lambda y, layer=layer: layer(y) * COUNT / 8, x)  # noqa: B023 # what it is then
        COUNT = 1
        return x


class Listed(Deep):
    def forward(self, x: Tensor) -> Tensor:
        scales, x = [1.0], self.first(x)
        for layer in self.layers:
            scales.append(scales[-1] + 1.0)
            x = x + self.through(lambda y, layer=layer: layer(y) * scales[-1] / 8, x)
        return x


class Defaults(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = self.through(lambda y, *, layer=layer: layer(y), x)
        for n in (1.0, 2.0, 2.0):
            x = self.through(lambda y, *, n=n: y * n, x)
        return x


class Recursive(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:

            def again(y: Tensor, n: int = 2, layer: nn.Module = layer) -> Tensor:
                return again(layer(y), n - 1) if n else y

            x = self.through(again, x)
        return x


class Grown(Deep):
    def __init__(self, through: Through) -> None:
        super().__init__(through, Scaled)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for n, layer in enumerate(self.layers):
            scales = cast("Scaled", layer).scales
            if n:
                scales.append(float(n))
            x = self.through(layer, x)
            if n:
                scales.pop()
        return x


class Functions(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for function in (torch.sin, torch.cos, _half, _twice):
            x = x + self.through(function, x)
        return x


class Sizes(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for n in (1, 2, 2):
            x = x + self.through(lambda y: y.sin() * y.shape[-1], x[:, :n]).sum()
        return x


class Itself(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in self.layers:
            x = x + self.through(lambda y: y, x)
        return x


class Strided(Deep):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        square = x.T @ x
        for y in (square, square.T, square):
            x = x + self.through(lambda y: y * (2 + y.is_contiguous()), y).sum()
        return x


def _half(x: Tensor) -> Tensor:
    return x / 2


def _twice(x: Tensor) -> Tensor:
    return x * 2


def _changed(change: Callable[[Any], object], kind: type[Layer] = Layer) -> Callable[[Through], Deep]:
    """A deep model whose second layer is changed."""

    def make(through: Through) -> Deep:
        model = Deep(through, kind)
        change(model.layers[1])
        return model

    return make


def _known(kind: type[Layer]) -> Callable[[Through], Deep]:
    """A deep model whose layers are known elsewhere."""

    def make(through: Through) -> Deep:
        model = Deep(through, kind)
        SCALES.clear()
        for n, layer in enumerate(cast("Any", model.layers)):
            SCALES[layer] = n + 1.0
            if kind is ByObject:
                layer.scale = types.SimpleNamespace(value=n + 1.0)
            if kind is ByPosition:
                layer.others = [list(model.layers)]
        FIRST[:], IDS[:] = [model.layers[0]], [id(model.layers[0])]
        return model

    return make


def _tagged(through: Through) -> Deep:
    model = Deep(through, ByTag)
    for n, layer in enumerate(model.layers):
        cast("Any", layer).linear.weight.tag = float(n)
    return model


def _slotted(through: Through) -> Deep:
    model = Deep(through, BySlot)
    for n, layer in enumerate(model.layers):
        cast("Any", layer).value = float(n)
    return model


def _one_part(through: Through) -> Deep:
    model = Deep(through, ByParts)
    first = cast("ByParts", model.layers[0])
    first.right = first.left
    return model


def _tied_first(through: Through) -> Deep:
    model = Deep(through)
    _tied(model.layers[0])
    return model


def _tied(layer: Any) -> None:
    layer.norm.weight = layer.linear.bias


CASES: dict[str, tuple[Callable[[Through], Deep], int]] = {
    "equal": (Deep, 1),
    "another captured tensor": (Captured, 1),
    "a number": (_changed(lambda layer: setattr(layer, "eps", 0.5)), 2),
    "a number further inside": (_changed(lambda layer: setattr(layer.norm, "eps", 0.5)), 2),
    "a number of the class": (_changed(lambda layer: setattr(layer, "factor", 3.0)), 2),
    "training": (_changed(lambda layer: layer.eval(), ByMode), 2),
    "a hook": (_changed(lambda layer: layer.linear.register_forward_hook(lambda m, a, out: out * 5)), 2),
    "another forward": (_changed(lambda layer: setattr(layer, "forward", lambda x: x * 2)), 2),
    "one tensor twice": (_changed(_tied), 2),
    "one tensor twice, and then two": (_tied_first, 2),
    "a tensor's attribute": (_tagged, 3),
    "one module twice, and then two": (_one_part, 2),
    "a slot": (_slotted, 3),
    "another class": (_changed(lambda layer: setattr(layer, "__class__", Doubled)), 2),
    "a list that is written to": (Grown, 3),
    "no gradient": (_changed(lambda layer: layer.linear.weight.requires_grad_(False)), 2),
    "a registry": (_known(ByRegistry), 3),
    "identity": (_known(ByIdentity), 3),
    "an id": (_known(ById), 3),
    "position": (_known(ByPosition), 3),
    "another object": (_known(ByObject), 3),
    "the sign of zero": (Numbered, 3),
    "gradients off": (Graded, 3),
    "autocast": (Cast, 3),
    "written to": (Written, 3),
    "a global that is written to": (Global, 3),
    "a list": (Listed, 3),
    "a keyword's default": (Defaults, 6),
    "recursion": (Recursive, 3),
    "functions": (Functions, 4),
    "sizes": (Sizes, 2),
    "strides": (Strided, 2),
    "nothing computed": (Itself, 3),
}


@pytest.fixture
def through() -> Through:
    @hopkit.define("t_alike", outline=True)
    def op(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    return lambda layer, x: op(layer, x)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Dynamo read."""
    from hopkit._torch import frame

    read, names = frame.Frame.read, list[str]()

    def noted(self: Any, name: str, *args: Any) -> Any:
        names.append(name)
        return read(self, name, *args)

    monkeypatch.setattr(frame.Frame, "read", noted)
    return names


def _trained(model: nn.Module, function: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    model.zero_grad()
    result = function(X)
    result.square().mean().backward()
    return [result.detach(), *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("name", CASES)
def test_equal_calls_are_read_once(name: str, through: Through, reads: list[str]) -> None:
    make, count = CASES[name]
    model = make(through)
    want = _trained(model, model)
    same(_trained(model, torch.compile(model, backend="eager", fullgraph=True)), want)
    assert len(reads) == count


@pytest.mark.parametrize("name", ["eps", "weight", "norm"])
def test_what_was_not_read_is_guarded(name: str, through: Through) -> None:
    """A change of a layer whose call was only found equal is seen."""
    model = Deep(through)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    same(compiled(X), model(X))
    last: Any = model.layers[-1]
    if name == "eps":
        last.eps = 0.5
    elif name == "norm":
        last.norm.eps = 0.5
    else:
        last.linear = nn.Linear(4, 4)
    same(compiled(X), model(X))


LINE = torch.arange(4.0)
ASKED: dict[str, tuple[Callable[[Tensor], object], Tensor, Tensor]] = {
    "shape": (lambda x: x.shape[0], LINE[:2], LINE[:3]),
    "stride": (lambda x: x.stride(0), LINE[:2], LINE[::2]),
    "dtype": (lambda x: x.dtype is torch.float32, LINE, LINE.double()),
    "gradient": (lambda x: x.requires_grad, LINE, LINE.clone().requires_grad_()),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_tensor_says_of_itself(name: str, through: Through) -> None:
    ask, first, second = ASKED[name]

    def twice(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(())
        for each in (x, y):
            total = total + through(lambda z: z * (2 + int(cast("Any", ask(z)))), each).sum()
        return total

    same(torch.compile(twice, backend="eager", fullgraph=True)(first, second), twice(first, second))


def test_a_leaf_is_told_from_what_is_computed(through: Through) -> None:
    def run(x: Tensor) -> Tensor:
        total = torch.zeros(())
        for each in (x, x * 1):
            total = total + through(lambda z: z * (2 + int(z.is_leaf)), each).sum()
        return total

    x = X.clone().requires_grad_()
    same(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


def test_gradients_that_are_there(through: Through, reads: list[str]) -> None:
    model = Deep(through, ByGradient)
    cast("Any", model.layers[1]).linear.weight.grad = torch.zeros(4, 4)
    with torch.no_grad():
        same(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))
    assert len(reads) == 2


class Asking(Layer):
    """Asks for what takes no part in what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.flag = nn.Parameter(torch.ones(1))
        self.table = {"a": 1.0, "b": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for n, value in enumerate(self.table.values()):
            x = x + n * value
        return x * 2 if self.flag.requires_grad else x * 3


@pytest.mark.parametrize("name", ["flag", "table"])
def test_what_is_only_asked_for_is_guarded(name: str, through: Through, reads: list[str]) -> None:
    model = Deep(through, Asking)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    same(compiled(X), model(X))
    assert len(reads) == 1
    last: Any = model.layers[-1]
    if name == "flag":
        last.flag.requires_grad_(False)
    else:
        last.table = dict(reversed(last.table.items()))
    same(compiled(X), model(X))


class Compared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.eps = nn.Linear(4, 4), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.linear(x) * (1 if self.eps > 0.25 else 2))


def test_numbers_that_may_change_are_not_mixed_up(through: Through) -> None:
    """With ``dynamic=True`` Dynamo has a symbol for a module's float, whose guards are not at its place."""
    model = Deep(through, cast("Any", Compared))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    same(compiled(X), model(X))
    cast("Any", model.layers[-1]).eps = 0.1
    same(compiled(X), model(X))


def test_symbols_are_told_apart(through: Through, reads: list[str]) -> None:
    """Sizes that are equal now need not be equal later."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        for n in (x.shape[0], y.shape[0], x.shape[0]):
            x = x + through(lambda z, n=n: z.sin() * n, x)
        return x

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for size in (5, 3):
        x, y = torch.randn(5, 2), torch.randn(size, 3)
        same(compiled(x, y), run(x, y))


@pytest.fixture
def pair() -> Callable[..., Tensor]:
    @hopkit.define("t_alike_pair", outline=True)
    def op(body: Subgraph, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        return body(x, y) * scale

    return op


def test_one_operand_twice_is_not_two(pair: Callable[..., Tensor], reads: list[str]) -> None:
    def body(x: Tensor, y: Tensor) -> Tensor:
        return x.sin() if x is y else y.cos()

    def run(x: Tensor) -> Tensor:
        y = x + 1
        return pair(body, y, y) + pair(body, y, x + 2) + pair(body, x + 3, x + 4)

    same(torch.compile(run, backend="eager", fullgraph=True)(X), run(X))
    assert len(reads) == 2


def test_options_are_told_apart(pair: Callable[..., Tensor], reads: list[str]) -> None:
    def run(x: Tensor) -> Tensor:
        for scale in (1.0, 2.0, 2.0):
            x = pair(torch.add, x.sin(), x.cos(), scale=scale)
        return x

    same(torch.compile(run, backend="eager", fullgraph=True)(X), run(X))
    assert len(reads) == 2


def test_an_op_that_is_not_pure_is_read_each_time(reads: list[str]) -> None:
    @hopkit.define("t_alike_impure", outline=True, pure=False)
    def op(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    def run(x: Tensor) -> Tensor:
        return op(torch.sin, op(torch.sin, x.cos()) + 1)

    same(torch.compile(run, backend="eager", fullgraph=True)(X), run(X))
    assert len(reads) == 2


def test_annotations_are_told_apart(through: Through) -> None:
    """A note that a user makes around a call is in its graph, and not in that of another."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.extend(m for m in graph.modules() if isinstance(m, torch.fx.GraphModule) and m is not graph)
        return graph

    def run(x: Tensor) -> Tensor:
        for n in range(2):
            with torch.fx.traceback.annotate({"n": n}):
                x = through(lambda y: y.sin(), x.cos())
        return x

    torch.compile(run, backend=backend, fullgraph=True)(X)
    found = [node.meta["custom"] for graph in graphs for node in graph.graph.find_nodes(op="call_method", target="sin")]
    assert found == [{"n": 0}, {"n": 1}]


def test_a_subgraph_that_changes_the_state_around_it(through: Through) -> None:
    def toggle(y: Tensor) -> Tensor:
        torch.set_grad_enabled(not torch.is_grad_enabled())
        return y.sin()

    def run(x: Tensor) -> tuple[Tensor, bool]:
        with torch.set_grad_enabled(True):
            for _ in range(3):
                x = through(toggle, x)
            return x, torch.is_grad_enabled()

    same(torch.compile(run, backend="eager")(X), run(X))


def test_calls_under_a_transform(through: Through) -> None:
    def run(xs: Tensor) -> Tensor:
        y = through(torch.sin, through(torch.sin, xs[0]))
        return torch.vmap(lambda x: through(torch.sin, through(torch.sin, x)) + through(torch.sin, y))(xs)

    same(torch.compile(run, backend="eager", fullgraph=True)(X), run(X))


def test_calls_in_functions_of_other_operators(through: Through) -> None:
    def run(x: Tensor) -> Tensor:
        x = through(lambda y: y.sin(), x.cos())
        x = torch.cond(x.sum() > 0, lambda x: through(lambda y: y.sin(), x.cos()), lambda x: x.cos(), (x,))
        return through(lambda y: y.sin(), x.cos())

    same(torch.compile(run, backend="eager", fullgraph=True)(X), run(X))


def test_exported(through: Through) -> None:
    """What a program calls its parameters is not what was read first."""
    model = Deep(through)
    program = torch.export.export(model, (X,), strict=True)
    same(program.module()(X), model(X))
    assert set(program.state_dict) == set(model.state_dict())
