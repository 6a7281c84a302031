"""Whether tensors are as they were."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hopkit._torch.fakes import FakeMode
from hopkit.extend.device import Seen


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
