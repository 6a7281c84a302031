"""The keys under which torch looks for an operator's kernels."""

from __future__ import annotations

from typing import cast

import torch
from torch._C import DispatchKey as DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

AUTOGRAD = DispatchKey.Autograd
META = DispatchKey.Meta
FAKE = FakeTensorMode
PROXY = ProxyTorchDispatchMode
FUNCTIONALIZE = FunctionalTensorMode
# Strided nested tensors have keys of their own that no composite key covers.
EVERY_DEVICE = (DispatchKey.CompositeExplicitAutograd, DispatchKey.NestedTensorCPU, DispatchKey.NestedTensorCUDA)


def is_device(device: object) -> bool:
    """Whether torch knows a device type of this name."""
    try:
        return isinstance(device, str) and bool(torch._C._dispatch_key_for_device(device))
    except RuntimeError:
        return False


def of_device(device: str) -> DispatchKey:
    """The key of a device type, such as "cuda"."""
    return cast("DispatchKey", getattr(DispatchKey, torch._C._dispatch_key_for_device(device)))


def is_dispatch_mode(entry: object) -> bool:
    """Whether this is a class of dispatch modes."""
    return isinstance(entry, type) and issubclass(entry, TorchDispatchMode)


def is_tensor_class(entry: object) -> bool:
    """Whether this is a class of tensors that torch asks about operators."""
    if isinstance(entry, type) and issubclass(entry, torch.Tensor):
        return entry.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return False


def is_entry(entry: object) -> bool:
    """Whether torch can look for a kernel under this."""
    return is_tensor_class(entry) or isinstance(entry, DispatchKey) or is_dispatch_mode(entry)
