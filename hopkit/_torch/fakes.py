"""Stand-ins: tensors with shapes and no values, in a fake mode of hopkit's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import detect_fake_mode
from torch._higher_order_ops.utils import suspend_functionalization
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    _temp_remove_metadata_torch_function_mode,
    _temp_remove_pre_dispatch_torch_function_mode,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

FakeMode = FakeTensorMode


class Stage:
    """Where a body is rehearsed: nothing records, nothing is computed, and every tensor made inside is known.

    Its fake mode is its own, so that a tensor from outside is told from one that was made inside by asking whose it is.
    """

    def __init__(self, inputs: Iterable[object]) -> None:
        outer = detect_fake_mode([unfunctional(t) for t in inputs if isinstance(t, torch.Tensor)])
        self._shapes = (outer.shape_env if outer else None) or ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the body may run: no tracer, transform or functionalization sees it."""
        with (
            suspend_functionalization(),
            temporarily_clear_interpreter_stack(),
            _disable_current_modes(),
            _temp_remove_pre_dispatch_torch_function_mode(),
            _temp_remove_metadata_torch_function_mode(),
            autograd_on(),
            self._shapes.ignore_fresh_unbacked_symbols(),
            self.mode,
        ):
            yield

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was made on this stage."""
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode is self.mode
        if is_traceable_wrapper_subclass(tensor):
            return all(self.owns(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return False

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stand-in of the same size, stride, dtype, device and ``requires_grad``. Call it inside `open`."""
        return stand_in(tensor, self.mode)


def outside_modes() -> contextlib.AbstractContextManager[object]:
    """Inside, no dispatch mode is active."""
    return _disable_current_modes()


def unfunctional(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor under every wrapper of functionalization."""
    while torch._is_functional_tensor(elem := getattr(tensor, "elem", tensor)):
        tensor = torch._from_functional_tensor(elem)
    return tensor


def stand_in(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake of ``tensor`` in ``mode``."""
    with torch._C.DisableTorchFunction(), torch.no_grad(), mode:
        tensor = unfunctional(tensor)
        if type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor) and tensor.layout is torch.strided:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        else:
            fake = mode.from_tensor(tensor, static_shapes=True).detach()
    return fake.requires_grad_(tensor.requires_grad)


def in_mode(value: object, mode: FakeTensorMode) -> object:
    """``value``, a fake of ``mode`` if it is a tensor."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or is_traceable_wrapper_subclass(value):
        return value
    return mode.from_tensor(value, static_shapes=True)


@contextlib.contextmanager
def autograd_on() -> Iterator[None]:
    """Lets autograd see what runs inside, also in a rule that torch entered below autograd."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - _AUTOGRAD_KEYS):
        yield


def _autograd_keys() -> torch._C.DispatchKeySet:
    before = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._AutoDispatchBelowAutograd():
        return torch._C._dispatch_tls_local_exclude_set() - before


_AUTOGRAD_KEYS = _autograd_keys()


def same_storage(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two stand-ins share memory."""
    return bool(left.untyped_storage()._cdata == right.untyped_storage()._cdata)
