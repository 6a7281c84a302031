"""Constants are computed once, and never stale."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from hopkit._torch.fakes import FakeMode
from hopkit_constgraph import clear, fold, refresh, run_const_graph_once, stats
from tests.constgraph.models import Merged, X
from tests.modes import Names
from tests.recording import same
from tests.saving import again

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch 2.13, of its own pytrees
    pytest.mark.filterwarnings("ignore:Please add support for subgraph args:UserWarning"),  # torch's, of any node kept
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's own
]


Program = torch.export.ExportedProgram


def pair() -> tuple[Merged, Any]:
    model = Merged()
    return model, fold(model, (X,))


def counts(model: nn.Module) -> tuple[int, int]:
    found = stats(model)
    return found.hits, found.misses


def test_it_runs_once() -> None:
    model, folded = pair()
    with torch.no_grad():
        for _ in range(3):
            same(folded(X), model(X))
    assert counts(folded) == (2, 1)
    assert stats(folded).bytes == 8 * 8 * 4


def _write(model: Merged) -> None:
    model.base.weight.add_(1.0)


def _copy(model: Merged) -> None:
    model.up.weight.copy_(torch.ones(8, 2))


def _swap(model: Merged) -> None:
    model.base.weight.data = torch.ones(8, 8)


def _load(model: Merged) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def _part(model: Merged) -> None:
    model.down.weight[0, 0] = 7.0


def _step(model: Merged) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


UPDATES = [_write, _copy, _swap, _load, _part, _step]


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_is_seen(update: Callable[[Merged], None]) -> None:
    model, folded = pair()
    with torch.no_grad():
        before = folded(X)
        update(model)
        want = model(X)
        assert not torch.equal(before, want)
        same(folded(X), want)
        same(folded(X), want)
    assert counts(folded) == (1, 2)


def test_another_parameter_is_seen() -> None:
    folded: Any = fold(Merged(), (X,))
    with torch.no_grad():
        folded(X)
        folded.base.weight = nn.Parameter(torch.ones(8, 8))
        want = nn.functional.linear(X, 1 + folded.up.weight @ folded.down.weight, folded.base.bias)
        same(folded(X), want)
        folded.load_state_dict({n: v + 1 for n, v in folded.state_dict().items()}, assign=True)
        want = nn.functional.linear(X, folded.base.weight + folded.up.weight @ folded.down.weight, folded.base.bias)
        same(folded(X), want)


def test_another_dtype_is_seen() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        folded.to(torch.float64)
        same(folded(X.double()), copy.deepcopy(model).double()(X.double()))


def test_what_is_written_to_a_constant_is_undone() -> None:
    model, folded = pair()
    with torch.no_grad():
        for constant in cast("tuple[Tensor, ...]", run_const_graph_once(folded._const_graph, weights(folded))):
            constant.zero_()
        same(folded(X), model(X))


def test_what_is_swapped_in_a_constant_is_undone() -> None:
    model, folded = pair()
    with torch.no_grad():
        for change in (torch.zeros_like, torch.t):
            (constant,) = cast("tuple[Tensor, ...]", run_const_graph_once(folded._const_graph, weights(folded)))
            constant.data = change(constant.data)
            same(folded(X), model(X))


def test_who_looks_on_sees_constants_computed() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        with Names() as spy:
            same(folded(X), model(X))
        assert "aten.add.Tensor" in spy.names
        same(torch.vmap(folded)(X.expand(3, *X.shape)), model(X).expand(3, 2, 8))
        with FakeMode(allow_non_fake_inputs=True) as mode:
            assert folded(mode.from_tensor(X)).shape == X.shape
        same(folded(X), model(X))
    assert counts(folded) == (1, 1)


def test_a_cuda_graph_that_is_recorded_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, folded = pair()
    with torch.no_grad():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            same(folded(X), model(X))
    assert counts(folded) == (0, 0)


def weights(folded: Any) -> tuple[Tensor, ...]:
    return folded.base.weight, folded.down.weight, folded.up.weight


def test_what_nobody_can_see_needs_a_word() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        model.base.weight.data.add_(1.0)  # torch counts nothing up
        refresh(folded)
        same(folded(X), model(X))
    assert counts(folded) == (0, 2)
    clear(folded)
    assert counts(folded) == (0, 0)


def test_under_inference_mode() -> None:
    model, folded = pair()
    with torch.inference_mode():
        folded(X)
        model.base.weight.mul_(2)
        same(folded(X), model(X))
        folded(X)
    same(folded(X), model(X))
    assert counts(folded)[1] > 1
    folded(X).sum().backward()


def test_weights_of_inference_mode_are_never_kept() -> None:
    with torch.inference_mode():
        model = Merged()
        folded: Any = fold(model, (X,))
        for _ in range(2):
            model.base.weight.add_(1.0)
            same(folded(X), model(X))
    assert counts(folded) == (0, 0)


def test_shared_memory_is_never_kept() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        model.share_memory()
        folded(X)
        folded(X)
    assert counts(folded) == (0, 1)


def test_autocast_is_another_state() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        with torch.autocast("cpu", torch.bfloat16):
            same(folded(X), model(X))
        same(folded(X), model(X))
    assert counts(folded) == (1, 2)


def test_copies_have_results_of_their_own() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        other = copy.deepcopy(folded)
        other.base.weight.add_(1.0)
        assert not torch.equal(other(X), folded(X))
        same(folded(X), model(X))


def test_threads_compute_once() -> None:
    model, folded = pair()
    want = model(X).detach()
    start = threading.Barrier(4)
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            start.wait()
            found.append(folded(X))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(found, [want] * 4)
    assert counts(folded)[1] == 1


def test_nothing_is_left_of_a_model_that_is_gone() -> None:
    _, folded = pair()
    folded(X).sum().backward()
    graph = weakref.ref(folded._const_graph)
    del folded
    gc.collect()
    assert graph() is None


# -- training --------------------------------------------------------------------------------------------------------


def slopes(model: nn.Module, *losses: Tensor, second: bool = False) -> list[Tensor]:
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for loss in losses:  # each backward is one of its own
        found = torch.autograd.grad(loss, parameters, create_graph=second)
        total = [t + g for t, g in zip(total, found, strict=True)]
    return total


def test_gradients_reach_the_weights() -> None:
    model, folded = pair()
    for _ in range(2):
        same(slopes(model, folded(X).sin().sum()), slopes(model, model(X).sin().sum()))
    assert counts(folded) == (1, 1)


def test_several_backwards_of_one_step() -> None:
    model, folded = pair()
    losses = folded(X).sin().sum(), folded(X * 2).cos().sum()
    same(slopes(model, *losses), slopes(model, model(X).sin().sum(), model(X * 2).cos().sum()))
    assert counts(folded) == (1, 1)


def test_a_second_derivative() -> None:
    model, folded = pair()

    def twice(run: nn.Module) -> list[Tensor]:
        first = slopes(model, run(X).sin().sum(), second=True)
        return list(torch.autograd.grad(torch.stack([f.square().sum() for f in first]).sum(), list(model.parameters())))

    same(twice(folded), twice(model))


def test_a_weight_that_is_frozen_and_thawed() -> None:
    model, folded = pair()
    folded(X).sum().backward()
    model.up.weight.requires_grad_(False)
    model.zero_grad()
    folded(X).sum().backward()
    assert model.up.weight.grad is None
    model.up.weight.requires_grad_()
    want = torch.autograd.grad(model(X).sum(), [model.up.weight])
    same(torch.autograd.grad(folded(X).sum(), [model.up.weight]), want)


def test_training_is_the_same() -> None:
    model, other = Merged(), Merged()
    folded = fold(other, (X,))
    for run, weights_of in ((model, model), (folded, other)):
        optimizer = torch.optim.SGD(weights_of.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            run(X).square().sum().backward()
            optimizer.step()
    same(other.state_dict(), model.state_dict())
    assert counts(folded) == (0, 4)


# -- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_follows_updates_without_compiling_again(backend: str) -> None:
    model, folded = pair()
    compiled: Any = torch.compile(folded, backend=backend, fullgraph=True)
    with torch.no_grad(), torch.compiler.set_stance("default"):
        same(compiled(X), model(X))
        with torch.compiler.set_stance("fail_on_recompile"):
            for update in UPDATES:
                update(model)
                same(compiled(X), model(X))
                same(compiled(X), model(X))


def test_compiled_it_runs_once() -> None:
    ran: list[int] = []

    @torch.library.custom_op("t_kept::counted", mutates_args=())
    def counted(x: Tensor) -> Tensor:
        ran.append(1)
        return x * 2

    counted.register_fake(torch.empty_like)

    class Part(nn.Module):
        def forward(self, weight: Tensor) -> tuple[Tensor]:
            return (cast("Tensor", torch.ops.t_kept.counted(weight)),)

    graph = torch.fx.symbolic_trace(Part())
    weight = torch.ones(8)

    def run(x: Tensor) -> Tensor:
        (y,) = cast("tuple[Tensor]", run_const_graph_once(graph, (weight,)))
        return (x + y).sin() + y

    compiled: Any = torch.compile(run, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            same(compiled(X), (X + 2).sin() + 2)
        assert len(ran) == 1
        weight.add_(1.0)
        same(compiled(X), (X + 4).sin() + 4)
    assert len(ran) == 2


def test_compiled_training() -> None:
    model, folded = pair()
    compiled: Any = torch.compile(folded, fullgraph=True)
    for _ in range(2):
        same(slopes(model, compiled(X).sin().sum()), slopes(model, model(X).sin().sum()))
        with torch.no_grad():
            _write(model)


# -- through the stack -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [lambda program: program, again], ids=["as it is", "saved"])
def test_exported_again_it_runs_once(
    way: Callable[[torch.export.ExportedProgram], torch.export.ExportedProgram],
) -> None:
    model, folded = pair()
    module: Any = way(torch.export.export(folded, (X,))).module()
    with torch.no_grad():
        for _ in range(3):
            same(module(X), model(X))
        assert counts(module) == (2, 1)
        for each in {id(w): w for w in (module.base.weight, model.base.weight)}.values():
            each.add_(1.0)
        same(module(X), model(X))
        assert counts(module) == (2, 2)
    got = torch.autograd.grad(module(X).sin().sum(), weights(module))
    same(got, torch.autograd.grad(model(X).sin().sum(), weights(model)))


def test_of_compiled_code_there_are_figures_and_a_word_helps_too() -> None:
    model, folded = pair()
    compiled: Any = torch.compile(folded, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(X)
        assert counts(folded) == (2, 1)
        assert stats(folded).bytes == 8 * 8 * 4
        model.base.weight.data.add_(1.0)  # torch counts nothing up
        refresh(folded)
        same(compiled(X), model(X))
        assert counts(folded) == (2, 2)
        clear(folded)
        assert counts(folded) == (0, 0)
        same(compiled(X), model(X))


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_nothing_is_left_of_weights_that_are_gone(compile_it: bool, train: bool) -> None:
    model, folded = pair()
    run: Any = torch.compile(folded) if compile_it else folded
    with torch.set_grad_enabled(train):
        run(X)
    memory = weakref.ref(model.base.weight.untyped_storage())
    del model, folded, run
    torch.compiler.reset()
    gc.collect()
    assert memory() is None


def test_weights_that_are_replaced_are_let_go_of() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
    memory = weakref.ref(model.base.weight.untyped_storage())
    folded.base.weight = nn.Parameter(torch.ones(8, 8))
    del model
    gc.collect()
    assert memory() is None
    assert stats(folded).bytes == 0


def test_a_first_call_that_fails_leaves_the_model_as_it_was() -> None:
    model, folded = pair()
    graph = folded._const_graph
    called = type(graph).forward

    def full(*_: object) -> object:
        raise MemoryError("there is no more")

    with torch.no_grad():
        type(graph).forward = full
        with pytest.raises(MemoryError, match="there is no more"):
            folded(X)
        type(graph).forward = called
        same(folded(X), model(X))
        _write(model)
        type(graph).forward = full
        with pytest.raises(MemoryError, match="there is no more"):
            folded(X)
        type(graph).forward = called
        same(folded(X), model(X))


def test_a_thread_that_writes_leaves_no_stale_value() -> None:
    model, folded = pair()
    stop = threading.Event()

    def write() -> None:
        with torch.no_grad():
            while not stop.is_set():
                model.base.weight.add_(1e-3)

    thread = threading.Thread(target=write)
    thread.start()
    with torch.no_grad():
        for _ in range(200):
            folded(X)
    stop.set()
    thread.join()
    with torch.no_grad():
        same(folded(X), model(X))


def test_every_autocast_dtype_is_a_state_of_its_own() -> None:
    model, folded = pair()
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                same(folded(X), model(X))
                with torch.autocast("cpu", enabled=False):
                    same(folded(X), model(X))
    assert counts(folded) == (3, 3)


def test_a_weight_in_memory_of_another_layout_is_seen() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        data = model.base.weight.data
        model.base.weight.data = data.t()  # the same memory, read in another order
        same(folded(X), model(X))
        model.base.weight.data = data[:1].expand(8, 8)
        same(folded(X), model(X))


def test_a_weight_whose_memory_is_taken_away_and_given_back_is_seen() -> None:
    model, folded = pair()
    with torch.no_grad():
        folded(X)
        storage = model.base.weight.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        model.base.weight.fill_(1.0)
        same(folded(X), model(X))


def test_compiled_it_follows_what_is_put_in_the_place_of_weights() -> None:
    _, folded = pair()
    compiled: Any = torch.compile(folded, backend="inductor", fullgraph=True)

    def want(x: Tensor) -> Tensor:
        weight = folded.base.weight + folded.up.weight @ folded.down.weight
        return nn.functional.linear(x, weight, folded.base.bias)

    with torch.no_grad():
        same(compiled(X), want(X))
        folded.base.weight = nn.Parameter(torch.ones(8, 8))
        same(compiled(X), want(X))
        folded.load_state_dict({name: value + 1 for name, value in folded.state_dict().items()}, assign=True)
        same(compiled(X), want(X))
        folded.base.weight.data = folded.base.weight.data.t() * 2
        same(compiled(X), want(X))
        folded.up.weight.requires_grad_(False)
        same(compiled(X), want(X))
        folded.to(torch.float64)
        same(compiled(X.double()), want(X.double()))
    same(
        torch.autograd.grad(compiled(X.double()).sum(), [folded.base.weight]), [torch.ones(8, 2).double() @ X.double()]
    )
