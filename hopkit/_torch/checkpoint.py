"""Activation checkpointing (torch/utils/checkpoint.py). A selective policy is asked about an op before its inside.

Where a graph is recorded, torch's partitioners go by the tags of its nodes (torch/_functorch/partitioners.py); without
them they choose what to save as they do everywhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
)

from hopkit._torch import trees
from hopkit._torch.autograd import needs_gradient, unhooked
from hopkit._torch.fakes import rehearsing
from hopkit._torch.levels import top
from hopkit._torch.state import dispatch_modes, forward_mode

T = TypeVar("T")

_numbers = itertools.count()

_LEFT_TO_THE_INSIDE = (CheckpointPolicy.PREFER_RECOMPUTE, False)


def inside() -> bool:
    """Whether what runs now is in a checkpoint: computed again, it has to save as many tensors."""
    hooks: Sequence[Callable[..., object]] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__


def uncounted() -> contextlib.AbstractContextManager[None]:
    """Inside, what autograd saves is saved, and no checkpoint knows: its body may save something else."""
    return unhooked() if inside() else contextlib.nullcontext()


def stays(mode: TorchDispatchMode) -> bool:
    """Whether a mode is active again when what runs now is computed again. One around a checkpoint may be over then."""
    return not inside() or type(mode).__module__ == checkpoint.__name__


@contextlib.contextmanager
def decided(operator: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> Iterator[None]:
    """Inside, what a policy says of the op holds for all that runs, unless it merely prefers to compute it again."""
    with contextlib.ExitStack() as stack:
        for mode in dispatch_modes():
            if isinstance(mode, _CachingTorchDispatchMode):
                stack.enter_context(_one_word(mode, operator, args, kwargs))
        yield


@contextlib.contextmanager
def _one_word(
    mode: _CachingTorchDispatchMode,
    operator: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Iterator[None]:
    policy = mode.policy_fn
    word = policy(SelectiveCheckpointContext(is_recompute=False), operator, *args, **kwargs)
    if word not in _LEFT_TO_THE_INSIDE:
        mode.policy_fn = lambda *_, **__: word
    try:
        yield
    finally:
        mode.policy_fn = policy


@contextlib.contextmanager
def taken_whole() -> Iterator[None]:
    """Inside, a checkpoint around this takes operators on functions as any other: what they decide, it cannot see.

    torch's own have no rule for it (2.13, 2.14), and a compiled checkpoint is one with a policy.
    """
    kinds = _CachingTorchDispatchMode, _CachedTorchDispatchMode
    # Those that an outer one of these has told stay told until that is over.
    modes = [m for m in dispatch_modes() if isinstance(m, kinds) and not m.supports_higher_order_operators]
    for mode in modes:
        mode.supports_higher_order_operators = True
    try:
        yield
    finally:
        for mode in modes:
            mode.supports_higher_order_operators = False


def computed_again(function: Callable[..., T], *args: object) -> T:
    """``function(*args)``, of which nothing is saved for backward: it is computed again there, with the same draws.

    As ``torch.utils.checkpoint`` does. In a graph it is up to the partitioner, which is told. Under a transform of
    torch.func and in forward mode, where torch has no such thing, everything is saved.

    Args:
        function: May close over tensors.
        args: Pytrees of tensors.
    """
    mode = get_proxy_mode()
    if mode is not None:
        graph = mode.tracer.graph
        before, number = len(graph.nodes), next(_numbers)
        result = function(*args)
        trains = needs_gradient(trees.leaves(result))
        for node in itertools.islice(graph.nodes, before if trains else len(graph.nodes), None):
            node.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=number)
        return result
    # A level of torch.func that is off here still forbids it.
    possible: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined] # not in stubs
    if rehearsing() or top() is not None or forward_mode() or not possible:
        return function(*args)
    return cast("T", checkpoint.checkpoint(function, *args, use_reentrant=False))
