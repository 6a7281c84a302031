"""Activation checkpointing (torch/utils/checkpoint.py). A selective policy is asked about an op before its inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, _CachingTorchDispatchMode

from hopkit._torch.fakes import unhooked
from hopkit._torch.state import dispatch_modes

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
