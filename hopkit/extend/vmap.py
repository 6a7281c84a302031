"""vmap: ``rule(info, in_dims, *args, **kwargs)`` on the author's arguments, or a rule on calls (`on_call`).

The vmap that asks is off while a rule on arguments runs; a rule on calls turns it off (``with batch.lower():``).
"""

from __future__ import annotations

from typing import Any, Protocol

from hopkit._torch.levels import Batch
from hopkit.call import Call
from hopkit.rule import on_call

__all__ = ["Batch", "BatchRule", "VmapRule", "on_call"]


class BatchRule(Protocol):
    """Gives the outputs of ``call``, wrapped by ``batch``; marked with `on_call`."""

    def __call__(self, batch: Batch, call: Call, /) -> object: ...


class VmapRule(Protocol):
    """``rule(info, in_dims, *args, **kwargs) -> (out, out_dims)``, as ``torch.library.register_vmap`` has it.

    ``info`` has ``batch_size`` and ``randomness``. ``in_dims`` has an entry for every argument, in the order of the
    parameters: the batched dimension of an operand or None, in its structure; None for a subgraph and for an option.
    ``out_dims`` is as ``out``, or one entry for all of it. A call whose subgraphs close over batched tensors is not
    given to such a rule; the next in the chain is asked.
    """

    def __call__(self, info: Batch, in_dims: tuple[object, ...], /, *args: Any, **kwargs: Any) -> tuple[Any, Any]: ...
