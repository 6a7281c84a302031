"""Equal calls of an outlined op are read once by Dynamo; calls that only look equal are not."""

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
SCALES: dict[nn.Module, float] = {}
FIRST: list[nn.Module] = []
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


class ByPosition(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(1 + self.others[0].index(self))


class ByObject(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * cast("float", self.scale.value)


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
        for layer in self.layers:
            cast("Any", layer).eps = float(len(x))
            x = self.through(layer, x)
        return x


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
            layer.scale = types.SimpleNamespace(value=n + 1.0)
            layer.others = [list(model.layers)]
        FIRST[:] = [model.layers[0]]
        return model

    return make


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
    "no gradient": (_changed(lambda layer: layer.linear.weight.requires_grad_(False)), 2),
    "a registry": (_known(ByRegistry), 3),
    "identity": (_known(ByIdentity), 3),
    "position": (_known(ByPosition), 3),
    "another object": (_known(ByObject), 3),
    "the sign of zero": (Numbered, 3),
    "gradients off": (Graded, 3),
    "autocast": (Cast, 3),
    "written to": (Written, 3),
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

    read, names = frame.Frame._read, list[str]()

    def noted(self: Any, name: str, *args: Any) -> Any:
        names.append(name)
        return read(self, name, *args)

    monkeypatch.setattr(frame.Frame, "_read", noted)
    return names


def _trained(model: nn.Module, function: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    model.zero_grad()
    result = function(X)
    result.square().sum().backward()
    return [result.detach(), *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("name", CASES)
def test_equal_calls_are_read_once(name: str, through: Through, reads: list[str]) -> None:
    make, count = CASES[name]
    model = make(through)
    want = _trained(model, model)
    same(_trained(model, torch.compile(model, backend="aot_eager", fullgraph=True)), want)
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


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count = nn.Linear(4, 4), 3

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.linear(x) * (1 if self.count > 2 else 2))


@pytest.mark.parametrize("count", [1, 5])
def test_numbers_that_may_change_are_not_mixed_up(count: int, through: Through) -> None:
    """With ``dynamic=True`` Dynamo has a symbol for every number of a module, and no guard of its value."""
    model = Deep(through, cast("Any", Counted))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    same(compiled(X), model(X))
    cast("Any", model.layers[-1]).count = count
    same(compiled(X), model(X))
