"""Whether tensors are as they were: looked at in Python, and in C++."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit._torch import seen as looks
from hopkit._torch.fakes import FakeMode
from hopkit._torch.native import Native
from hopkit.extend.device import Seen


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Native:
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("HOPKIT_NATIVE")
        native = Native("seen")
        native.build()
        native.ask()
    assert native.module is not None
    return native


@pytest.fixture(params=["Python", "C++"], autouse=True)
def _look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    native = request.getfixturevalue("built") if request.param == "C++" else Native("seen")
    monkeypatch.setattr(looks, "NATIVE", native)


def _write(t: Tensor) -> None:
    with torch.no_grad():
        t.add_(1.0)


def _write_to_a_view(t: Tensor) -> None:
    with torch.no_grad():
        t[0].zero_()


def _other_memory(t: Tensor) -> None:
    t.data = t.data.clone()


def _other_order(t: Tensor) -> None:
    t.data = t.data.t()


def _other_sizes(t: Tensor) -> None:
    t.data = t.data.reshape(-1)


def _other_dtype(t: Tensor) -> None:
    t.data = t.data.view(torch.int32).view(torch.float32)[:, :2]


def _thaw(t: Tensor) -> None:
    t.requires_grad_(not t.requires_grad)


def _away(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


CHANGES = [_write, _write_to_a_view, _other_memory, _other_order, _other_sizes, _other_dtype, _thaw, _away]


in_python = pytest.mark.parametrize("_look", ["Python"], indirect=True)
in_cpp = pytest.mark.parametrize("_look", ["C++"], indirect=True)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable[[Tensor], None]) -> None:
    tensors = nn.Parameter(torch.rand(3, 3)), torch.rand(2)
    seen = Seen(tensors)
    assert seen.holds(tensors)
    assert seen.at_rest(tensors)
    change(tensors[0])
    assert not seen.holds(tensors)
    assert not seen.at_rest(tensors)


def test_other_tensors_are_others_though_they_are_equal() -> None:
    tensors = torch.ones(1), torch.ones(1)
    seen = Seen(tensors)
    assert not seen.holds((tensors[1], tensors[0]))
    assert not seen.holds(tensors[:1])
    assert not seen.holds((tensors[0], tensors[1].detach()))
    assert Seen(()).holds(())
    assert not Seen(()).holds(tensors)


def test_no_mode_is_a_change() -> None:
    tensors = (nn.Parameter(torch.rand(3, 3)),)
    with torch.inference_mode():
        inside = Seen(tensors)
    for seen in (inside, Seen(tensors)):
        for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
            with mode:
                assert seen.holds(tensors)


@contextmanager
def _autocast_elsewhere() -> Iterator[None]:
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize(
    "active",
    [
        torch.inference_mode,
        lambda: torch.autocast("cpu"),
        _autocast_elsewhere,
        torch.autograd.forward_ad.dual_level,
        lambda: FakeMode(allow_non_fake_inputs=True),
    ],
)
def test_at_rest_nothing_is_active(active: Callable[[], AbstractContextManager[object]]) -> None:
    tensors = (nn.Parameter(torch.rand(3, 3)),)
    seen = Seen(tensors)
    with active():
        assert not seen.at_rest(tensors)
    assert seen.at_rest(tensors)


def test_at_rest_nothing_records_or_transforms() -> None:
    tensors = (nn.Parameter(torch.rand(3, 3)),)
    seen = Seen(tensors)
    told: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        told.append(seen.at_rest(tensors))
        return x + 1

    make_fx(ask)(torch.zeros(2))
    make_fx(ask, pre_dispatch=True)(torch.zeros(2))
    torch.vmap(ask)(torch.zeros(2))
    torch.func.functionalize(ask)(torch.zeros(2))
    assert told == [False] * 4


def test_what_goes_with_tensors_is_looked_at_too() -> None:
    tensors, lost = [torch.rand(3)], list[int]()
    beside = [torch.rand(2)]
    seen = Seen(tensors, lambda: lost.append(1), beside)
    assert seen.holds([*tensors, *beside])
    assert not seen.holds(tensors)
    _write(beside[0])
    assert not seen.holds([*tensors, *beside])
    assert seen.of({id(tensors[0])})
    assert not seen.of({id(beside[0])})
    beside.clear()
    assert not lost
    tensors.clear()
    assert lost


def test_what_is_gone_is_told() -> None:
    told: list[int] = []
    tensors = [torch.rand(3), torch.rand(3)]
    seen = Seen(tensors, lambda: told.append(1))
    assert seen.of({id(tensors[1])})
    assert not seen.of({id(told)})
    del tensors[0]
    gc.collect()
    assert told == [1]
    assert not seen.holds(tensors)


@in_python
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_looked_at_in_python_is_looked_at_in_cpp(
    change: Callable[[Tensor], None], built: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = tuple(nn.Parameter(torch.rand(3, 3)) for _ in range(looks.MANY))
    seen, few = Seen(tensors), Seen(tensors[1:])
    monkeypatch.setattr(looks, "NATIVE", built)
    before = seen._look
    assert seen.holds(tensors)
    assert few.at_rest(tensors[1:])
    assert seen._look is not before
    assert isinstance(few._look, looks._InPython)  # too few to be worth it
    with torch.inference_mode():
        assert seen.holds(list(tensors))
    change(tensors[-1])
    assert not seen.holds(tensors)
    assert not seen.at_rest(tensors)


@in_python
def test_a_write_before_cpp_looked_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tuple(torch.rand(3) for _ in range(looks.MANY))
    seen = Seen(tensors)

    class Late:
        def seen(self, tensors: tuple[Tensor, ...]) -> Callable[[object], bool]:
            _write(tensors[0])
            return lambda _: True

    monkeypatch.setattr(looks.NATIVE, "module", Late())
    assert seen.holds(tensors)
    assert not seen.holds(tensors)


@in_cpp
def test_cpp_looks_at_plain_tensors_alone(built: Native) -> None:
    assert built.module is not None
    look = built.module.seen
    with torch.inference_mode():
        made_there = torch.ones(1)
    for none in (1, object(), torch.ones(1).untyped_storage(), made_there, torch.ones(1).to_sparse()):
        with pytest.raises(TypeError):
            look((none,))
        assert not look((torch.ones(1),))((none,))
    with pytest.raises(TypeError):
        look([])
    with pytest.raises(TypeError):
        look(())([])


@in_cpp
def test_subclasses_are_looked_at_in_python() -> None:
    class Own(Tensor):
        pass

    tensors = tuple(torch.ones(2).as_subclass(Own) for _ in range(looks.MANY))
    seen = Seen(tensors)
    assert seen.holds(tensors)
    assert seen.holds(tensors)
    _write(tensors[-1])
    assert not seen.holds(tensors)
