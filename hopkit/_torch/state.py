"""What is active in this thread: the questions that an op asks on its way in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._C import DispatchKey
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)

_stack_len = torch._C._len_torch_dispatch_stack
_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = DispatchKey.PreDispatch
_profiler = torch.autograd.profiler
_dynamo = torch.compiler.is_dynamo_compiling


def quiet() -> bool:
    """Whether no dispatch mode, tracer or profiler is active. The fast path asks this and nothing else of torch.

    Transforms, forward AD, autocast, inference mode and torch-function modes see what the body does, as they would see
    any code; they need no word from the op. Dynamo, which reads this code, goes on to the body.
    """
    return _dynamo() or not (_stack_len() or _profiler._is_profiler_enabled or _included(_PRE_DISPATCH))


def profiling() -> bool:
    """Whether a profiler is active."""
    return bool(_profiler._is_profiler_enabled)


def recording() -> bool:
    """Whether something records a graph in which the op can be one node.

    Under vmap, jvp and grad the body runs in place, and what records sees its inside.
    """
    return get_proxy_mode() is not None and all(
        interpreter.key() == TransformType.Functionalize for interpreter in retrieve_all_functorch_interpreters()
    )


def dispatch_modes() -> Iterator[TorchDispatchMode]:
    """The active dispatch modes, innermost first."""
    return reversed(_get_current_dispatch_mode_stack())


def forward_mode() -> bool:
    """Whether dual numbers may be about."""
    return forward_ad._current_level >= 0


def transforming() -> bool:
    """Whether a transform of torch.func is active, other than functionalize."""
    return any(
        interpreter.key() != TransformType.Functionalize for interpreter in retrieve_all_functorch_interpreters()
    )


def foreign(value: object) -> bool:
    """Whether this is a tensor subclass that wants to see the inside of an op."""
    return isinstance(value, torch.Tensor) and type(value) not in _KNOWN and is_traceable_wrapper_subclass(value)


_KNOWN = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def symbolic(inputs: object) -> bool:
    """Whether torch.fx traces symbolically, as it does to unpickle a graph: it takes an operator as it stands."""
    return isinstance(inputs, (tuple, list)) and any(isinstance(value, torch.fx.Proxy) for value in inputs)
