"""What compiled code takes from a folded model: its constants, and none of the weights that only these need."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hopkit._torch.inductor import counting
from hopkit_constgraph import fold, stats
from tests.constgraph.models import Merged, X
from tests.constgraph.test_kept import UPDATES, counts, pair
from tests.fresh import python
from tests.recording import same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
    pytest.mark.filterwarnings("ignore:Please add support for subgraph args:UserWarning"),  # torch's, of any node kept
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's own
]

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


class Seen:
    """Compiles, and keeps the graphs."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs = list[Any]()
        self._backend = counting(backend, self.graphs)

    def compiled(self, run: Callable[..., object]) -> Any:
        return torch.compile(run, backend=self._backend, fullgraph=True)


def of(folded: Any, x: Tensor) -> Tensor:
    """What the folded model is to give, from its weights of today."""
    weight = folded.base.weight + folded.up.weight @ folded.down.weight
    return nn.functional.linear(x, weight, folded.base.bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_constants_are_inputs(backend: str) -> None:
    _, folded = pair()
    seen = Seen(backend)
    same(seen.compiled(folded)(X), of(folded, X))
    (graph,) = seen.graphs
    assert len(graph.graph.find_nodes(op="placeholder")) == 3  # the input, the bias, the constant
    assert "constgraph" not in graph.code


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(UPDATES)))
def test_an_update_compiles_nothing(backend: str, number: int) -> None:
    model, folded = pair()
    seen = Seen(backend)
    compiled = seen.compiled(folded)
    same(compiled(X), of(folded, X))
    UPDATES[number](model)
    same(compiled(X), of(folded, X))
    same(compiled(X), of(folded, X))
    assert len(seen.graphs) == 1


def test_another_dtype_compiles_again() -> None:
    _, folded = pair()
    seen = Seen()
    compiled = seen.compiled(folded)
    compiled(X)
    folded.to(torch.float64)
    same(compiled(X.double()), of(folded, X.double()))
    assert len(seen.graphs) == 2


def test_another_size_compiles_again() -> None:
    _, folded = pair()
    seen = Seen("inductor")
    compiled = seen.compiled(folded)
    compiled(X)
    folded.base.weight = nn.Parameter(torch.ones(4, 8))
    folded.base.bias = nn.Parameter(torch.ones(4))
    folded.up.weight = nn.Parameter(torch.ones(4, folded.up.weight.shape[1]))
    same(compiled(X), of(folded, X))
    same(compiled(X), of(folded, X))


def test_other_strides_are_seen() -> None:
    _, folded = pair()
    compiled = Seen("inductor").compiled(folded)
    compiled(X)
    for name in ("base", "up", "down"):
        part = folded.get_submodule(name)
        part.weight.data = part.weight.data.t().contiguous().t() * 2
    same(compiled(X), of(folded, X))


def test_a_parametrized_weight_comes_and_goes() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    _, folded = pair()
    compiled = Seen().compiled(folded)
    compiled(X)
    parametrize.register_parametrization(folded.base, "weight", Twice())
    same(compiled(X), of(folded, X))
    parametrize.remove_parametrizations(folded.base, "weight")
    same(compiled(X), of(folded, X))


# -- written to in the same code ---------------------------------------------------------------------------------------


def write(folded: Any) -> None:
    folded.base.weight.add_(1.0)


def replace(folded: Any) -> None:
    folded.base.weight = nn.Parameter(torch.ones(8, 8))


def swap(folded: Any) -> None:
    folded.base._parameters["weight"] = torch.ones(8, 8)


def data(folded: Any) -> None:
    folded.base.weight.data = torch.ones(8, 8)


def view(folded: Any) -> None:
    folded.base.weight.view(-1)[3:].mul_(2)


def deleted(folded: Any) -> None:
    other = folded.up.weight * 2
    del folded.up.weight
    folded.up.weight = nn.Parameter(other)


@pytest.mark.parametrize("change", [write, replace, swap, data, view, deleted])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [False, True])
def test_a_weight_that_is_changed_in_compiled_code(change: Callable[[Any], None], backend: str, first: bool) -> None:
    def run(folded: Any, x: Tensor) -> list[Tensor]:
        results = [folded(x)] if first else []
        change(folded)
        results.append(folded(x))
        change(folded)
        return [*results, folded(x)]

    _, folded = pair()
    other = copy.deepcopy(folded)
    compiled: Any = torch.compile(run, backend=backend)
    for _ in range(3):
        same(compiled(folded, X), run(other, X))
        same(dict(folded.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_changed_through_what_it_is_part_of(backend: str) -> None:
    flat = torch.randn(64)
    model = Merged()
    model.base.weight = nn.Parameter(flat.view(8, 8))
    folded: Any = fold(model, (X,))

    def run(x: Tensor) -> Tensor:
        flat.add_(1.0)
        return cast("Tensor", folded(x))

    compiled: Any = torch.compile(run, backend=backend, fullgraph=True)
    same(compiled(X), of(folded, X))
    same(compiled(X), of(folded, X))


class Constant(nn.Module):
    """Gives a constant itself, and one that is a view of a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        constant = self.weight @ self.weight
        return constant, x @ constant


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_to_a_result_is_undone(backend: str) -> None:
    model = Constant()
    want = model(X)
    folded: Any = fold(model, (X,))
    compiled: Any = torch.compile(folded, backend=backend, fullgraph=True)
    for _ in range(3):
        got = compiled(X)
        same(got, want)
        got[0].zero_()


def zeroed(constant: Tensor) -> None:
    constant.zero_()


def swapped(constant: Tensor) -> None:
    constant.data = torch.zeros(8, 8)


def partly(constant: Tensor) -> None:
    constant[1:].t().mul_(3)


@pytest.mark.parametrize("spoil", [zeroed, swapped, partly])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_to_a_result_in_compiled_code_is_undone(spoil: Callable[[Tensor], None], backend: str) -> None:
    model = Constant()
    want = model(X)
    folded: Any = fold(model, (X,))

    def run(x: Tensor) -> tuple[Tensor, ...]:
        constant, y = folded(x)
        spoil(constant)
        return (y, *folded(x))

    compiled: Any = torch.compile(run, backend=backend, fullgraph=True)
    for _ in range(3):
        same(compiled(X), (want[1], *want))


# -- what else the result depends on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_and_inside(backend: str) -> None:
    _, folded = pair()

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cast("Tensor", folded(x))

    def undone(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return cast("Tensor", folded(x))

    for run in (folded, inside, undone):
        compiled: Any = torch.compile(run, backend=backend, fullgraph=True)
        for _ in range(2):
            same(compiled(X), run(X))
            with torch.autocast("cpu", torch.bfloat16):
                same(compiled(X), run(X))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_come_and_go(backend: str) -> None:
    model, folded = pair()
    compiled: Any = torch.compile(folded, backend=backend, fullgraph=True)

    @torch.no_grad()
    def quiet(x: Tensor) -> Tensor:
        return cast("Tensor", folded(x))

    quietly: Any = torch.compile(quiet, backend=backend, fullgraph=True)
    for _ in range(2):
        same(compiled(X), of(folded, X))
        with torch.enable_grad():
            got = torch.autograd.grad(compiled(X).sin().sum(), [folded.base.weight])
            same(got, torch.autograd.grad(model(X).sin().sum(), [model.base.weight]))
            assert not quietly(X).requires_grad
            same(quietly(X), of(folded, X))
        with torch.inference_mode():
            same(compiled(X), of(folded, X))
            same(quietly(X), of(folded, X))


def test_functional_call() -> None:
    _, folded = pair()
    other = {name: value + 1 for name, value in folded.named_parameters()}

    def run(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return cast("Tensor", torch.func.functional_call(folded, weights, (x,)))

    compiled: Any = torch.compile(run, backend="aot_eager")
    for _ in range(2):
        same(compiled(X, other), run(X, other))
        same(compiled(X, dict(folded.named_parameters())), of(folded, X))
    outside: Any = torch.compile(folded, backend="aot_eager")
    for _ in range(2):
        same(outside(X), of(folded, X))
        same(torch.func.functional_call(outside, {f"_orig_mod.{n}": v for n, v in other.items()}, (X,)), run(X, other))


def test_transforms() -> None:
    _, folded = pair()
    xs = X.expand(3, *X.shape)
    compiled: Any = torch.compile(torch.vmap(folded), backend="aot_eager")
    same(compiled(xs), of(folded, X).expand(3, 2, 8))
    inner: Any = torch.vmap(torch.compile(folded, backend="aot_eager"))
    same(inner(xs), of(folded, X).expand(3, 2, 8))


def test_as_a_part_of_a_model_and_in_a_branch() -> None:
    _, folded = pair()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = folded

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.part(x).sin()
            found: Tensor = torch.cond(x.sum() > 0, self.part, torch.sin, (x,))
            return found

    whole = Whole()
    seen = Seen()
    compiled = seen.compiled(whole)
    for _ in range(2):
        for x in (X, -X):
            same(compiled(x), whole(x))
        write(folded)
    assert len(seen.graphs) == 1


def test_sizes_that_vary() -> None:
    model = Merged()
    batch = torch.export.Dim("batch", min=2, max=64)
    folded: Any = fold(model, (X,), dynamic_shapes=({0: batch},))
    graphs: list[object] = []
    compiled: Any = torch.compile(folded, backend=counting("inductor", graphs), dynamic=True)
    for size in (2, 3, 5):
        x = torch.randn(size, 8)
        same(compiled(x), of(folded, x))
    write(folded)
    same(compiled(X), of(folded, X))
    assert len(graphs) == 1


def test_copies() -> None:
    _, folded = pair()
    compiled: Any = torch.compile(folded, backend="aot_eager")
    compiled(X)
    other = copy.deepcopy(folded)
    write(other)
    copied: Any = torch.compile(other, backend="aot_eager")
    same(copied(X), of(other, X))
    same(compiled(X), of(folded, X))


def test_shared_memory() -> None:
    _, folded = pair()
    compiled: Any = torch.compile(folded, backend="aot_eager", fullgraph=True)
    compiled(X)
    folded.share_memory()
    for _ in range(2):
        folded.base.weight.numpy()[:] += 1  # as another process would
        same(compiled(X), of(folded, X))


def test_figures() -> None:
    _, folded = pair()
    compiled: Any = torch.compile(folded, backend="aot_eager", fullgraph=True)
    compiled(X)
    assert counts(folded) == (0, 1)
    for _ in range(3):
        compiled(X)
    assert counts(folded) == (3, 1)
    write(folded)
    compiled(X)
    assert counts(folded) == (3, 2)
    assert stats(folded).bytes == 8 * 8 * 4


def test_guards_may_be_skipped() -> None:
    _, folded = pair()
    compiled: Any = torch.compile(folded, backend="inductor", fullgraph=True)
    compiled(X)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        for _ in range(2):
            write(folded)
            same(compiled(X), of(folded, X))


@pytest.mark.filterwarnings("ignore:op 'constgraph_run_once' is not kept")  # what it says is in the error too
def test_weights_that_fit_no_more_are_told_of_as_before() -> None:
    _, folded = pair()
    compiled = Seen().compiled(folded)
    compiled(X)
    before = folded.up.weight
    folded.up.weight = nn.Parameter(torch.ones(3, 5))
    with pytest.raises(RuntimeError, match="exception"):
        compiled(X)
    folded.up.weight = before
    same(compiled(X), of(folded, X))


def test_a_weight_that_others_read_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight @ self.weight) + x @ self.weight

    model = Both()
    folded: Any = fold(model, (X,))

    def run(x: Tensor) -> Tensor:
        return cast("Tensor", folded(folded(x)))

    compiled = Seen().compiled(run)
    for _ in range(2):
        same(compiled(X), model(model(X)))
        model.weight.mul_(2)


CACHED = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from torch._dynamo.utils import counters
from hopkit_constgraph import fold
from tests.constgraph.models import Merged, X

with torch.no_grad():
    for number in range(2):
        model = Merged()
        model.base.weight.add_(number + int(sys.argv[1]))
        compiled = torch.compile(fold(model, (X,)), fullgraph=True)
        torch.testing.assert_close(compiled(X), model(X))
        torch.compiler.reset()
print(counters["inductor"]["fxgraph_cache_miss"], counters["aot_autograd"]["autograd_cache_miss"])
"""


def test_what_is_cached_is_good_for_other_models_and_processes(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    misses = [python("-c", CACHED, number, env=env).stdout.split() for number in (0, 5)]
    assert misses == [["1", "1"], ["0", "0"]]
