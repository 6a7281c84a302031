"""Everything global or thread-local in torch, and in hopkit, that a call could leave changed (2.13, 2.14).

Tests hold it before a call against after. If a name is gone, leave its line out.
"""

from __future__ import annotations

import contextvars
import linecache
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._C import _functorch
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._guards import CompileContext, TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.graph_module import _loader
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hopkit._torch.levels import has_duals

DEVICES = ("cpu", "cuda")


def snapshot() -> dict[str, object]:
    """What there is, by name; the same before and after a call that leaves nothing behind."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return {
        "dispatch modes": [*map(id, _get_current_dispatch_mode_stack())],
        "infrastructure modes": [
            id(torch._C._get_dispatch_mode(key))
            for key in (
                torch._C._TorchDispatchModeKey.FAKE,
                torch._C._TorchDispatchModeKey.PROXY,
                torch._C._TorchDispatchModeKey.FUNCTIONAL,
            )
        ],
        "function modes": [*map(id, _get_current_function_mode_stack())],
        "torch function": torch._C._is_torch_function_enabled(),
        "transforms": [(i.key(), i.level()) for i in retrieve_all_functorch_interpreters()],
        "level of torch.func": _functorch.maybe_current_level(),
        "forward AD": (forward_ad._current_level, eager_transforms.JVP_NESTING, has_duals()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "fw grad": torch._C._is_fwd_grad_enabled(),
        "autocast": [
            (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d), torch.is_autocast_cache_enabled())
            for d in DEVICES
        ],
        "included keys": str(torch._C._dispatch_tls_local_include_set()),
        "excluded keys": str(torch._C._dispatch_tls_local_exclude_set()),
        "single level function": _functorch.get_single_level_autograd_function_allowed(),
        "saved tensor hooks": [*map(id, hooks or ())],
        "tracer": id(get_proxy_mode()),
        "contexts": (id(TracingContext.try_get()), id(CompileContext.try_get())),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "hopkit": {v.name: _plain(v) for v in contextvars.copy_context() if v.name.startswith("hopkit.")},
    }


def _plain(variable: contextvars.ContextVar[object]) -> str:
    # A variable that was set and reset is the same as one that was never set.
    return str(variable.get())


def changed(before: dict[str, object]) -> str:
    """What is not as it was, or ""."""
    after = snapshot()
    told = [f"{name} was {before[name]}, is {after[name]}" for name in before if before[name] != after[name]]
    return "; ".join(told)


@contextmanager
def nothing() -> Iterator[None]:
    """Inside, whatever raises: everything is as it was."""
    before = snapshot()
    try:
        yield
    finally:
        told = changed(before)
        assert not told, told


def forget_traces() -> None:
    """Let go of what torch keeps of every trace: the text of its graphs, and what an operator gave on stand-ins."""
    for name in [name for name in linecache.cache if name.startswith("<eval_with_key>")]:
        del linecache.cache[name]
    _loader.eval_cache.clear()
    FakeTensorMode.cache_clear()


def forget_numbers() -> None:
    """Forget which Python floats became constants when Dynamo last compiled: torch would not fail for them again."""
    from torch._dynamo.symbolic_convert import TensorifyState  # it loads the compiler

    TensorifyState.clear()
