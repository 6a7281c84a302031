"""The keys under which torch looks for an operator's kernels."""

from __future__ import annotations

from typing import cast

import torch
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import TorchDispatchMode

AUTOGRAD = DispatchKey.Autograd
FAKE = FakeTensorMode
PROXY = ProxyTorchDispatchMode
FUNCTIONALIZE = FunctionalTensorMode
# Strided nested tensors have keys of their own that no composite key covers.
EVERY_DEVICE = (DispatchKey.CompositeExplicitAutograd, DispatchKey.NestedTensorCPU, DispatchKey.NestedTensorCUDA)


def of_device(device: str) -> DispatchKey:
    """The key of a device type, such as "cuda".

    Raises:
        RuntimeError: torch knows no such device type.
    """
    return cast("DispatchKey", getattr(DispatchKey, torch._C._dispatch_key_for_device(device)))


def is_dispatch_mode(entry: object) -> bool:
    """Whether this is a class of dispatch modes."""
    return isinstance(entry, type) and issubclass(entry, TorchDispatchMode)


def is_entry(entry: object) -> bool:
    """Whether torch can look for a kernel under this."""
    if isinstance(entry, type):
        return issubclass(entry, (TorchDispatchMode, torch.Tensor))
    return isinstance(entry, DispatchKey)
