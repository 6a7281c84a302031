"""The generators of torch's random numbers: what they drew is drawn again from the state that they were in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from hopkit._torch.levels import base
from hopkit._torch.state import before_dispatch, shapes_only, transforms
from hopkit.errors import AutogradError


class _Device(Protocol):
    def get_rng_state(self, device: torch.device) -> torch.Tensor: ...

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None: ...


def repeatable() -> bool:
    """Whether a call that is recorded here can draw again in backward.

    Under vmap every item would have a state. Before dispatch its node is there already, and gives none.
    """
    return not (before_dispatch() or torch.compiler.is_exporting() or transforms() - {"grad"})


def states(devices: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """The states of these devices' generators; on stand-ins, what is like them.

    Raises:
        AutogradError: A graph of torch's operators is recorded.
    """
    _only_as_a_node()
    found = tuple(map(_state, devices))
    return tuple(torch.empty(len(state), dtype=torch.uint8) for state in found) if shapes_only(()) else found


@contextlib.contextmanager
def drawing_from(devices: Sequence[str], states: Sequence[object]) -> Iterator[None]:
    """Inside, these devices draw what they drew from ``states`` on; afterwards they are as before.

    Raises:
        AutogradError: A graph of torch's operators is recorded.
    """
    _only_as_a_node()
    if shapes_only(states):
        yield
        return
    before = [_state(device) for device in devices]
    try:
        for device, state in zip(devices, states, strict=True):
            _set(device, base(cast("torch.Tensor", state)))
        yield
    finally:
        for device, state in zip(devices, before, strict=True):
            _set(device, state)


def _only_as_a_node() -> None:
    if get_proxy_mode() is not None:
        raise AutogradError(
            "what draws random numbers and is trained",
            "was to be recorded without the op's node",
            why="backward draws the same from the states of the generators, which no operator of torch's gives",
            todo="Keep the node, or record call and backward together inside `hopkit.decompose(op)`",
        )


def _state(device: str) -> torch.Tensor:
    # Of the CPU torch has one that takes no device.
    return torch.get_rng_state() if device == "cpu" else _module(device).get_rng_state(torch.device(device))


def _set(device: str, state: torch.Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        _module(device).set_rng_state(state, torch.device(device))


def _module(device: str) -> _Device:
    return cast("_Device", torch.get_device_module(device))
