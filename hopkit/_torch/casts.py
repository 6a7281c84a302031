"""Autocast, as it is now or as it was elsewhere (torch._C._autocast_supported_devices; 2.13, 2.14).

If the list of devices is gone, write down those that matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


def casts() -> dict[str, torch.dtype]:
    """What autocast casts to, by device; it is off for others."""
    devices = torch._C._autocast_supported_devices()
    return {device: torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}


@contextlib.contextmanager
def casting(to: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inside, autocast is on for these devices alone. For none, as backward runs, and code in which all casts are."""
    with contextlib.ExitStack() as stack:
        for device, dtype in to.items():
            stack.enter_context(torch.autocast(device, dtype=dtype))
        for device in casts().keys() - to.keys():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
