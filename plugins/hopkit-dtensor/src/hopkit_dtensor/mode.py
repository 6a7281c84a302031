"""The mode ``dtensor``. Where an op has no sharding rule its body runs on the DTensors, and placements flow through."""

from __future__ import annotations

from collections.abc import Iterable

from torch.distributed.tensor import DTensor

from hopkit.extend import Mode, hookimpl


@hookimpl
def hopkit_add_modes() -> Iterable[Mode]:
    """Brings the mode; `sharding` attaches the rules of an op's author to it."""
    gives = "the op's result, as DTensors of the placements that the author declared"
    return [Mode("dtensor", entry=DTensor, gives=gives, default="decomposing", in_place=True)]
