"""What is active in this thread: the questions that an op asks on its way in."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch._C import DispatchKey
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, get_proxy_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)

from hopkit._torch import trees
from hopkit._torch.levels import base

_stack_len = torch._C._len_torch_dispatch_stack
_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = DispatchKey.PreDispatch
_profiler_enabled = torch._C._autograd._profiler_enabled


def quiet() -> bool:
    """Whether no dispatch mode, tracer or profiler is active. The fast path asks this and nothing else of torch.

    Transforms, forward AD, autocast, inference mode and torch-function modes see what the body does, as they would see
    any code; they need no word from the op.
    """
    return not (_stack_len() or _profiler_enabled() or _included(_PRE_DISPATCH))


def logged() -> bool:
    """Whether something is active that writes down where code says that it runs: a profiler, or torch's DebugMode."""
    return _profiler_enabled() or any(_from(mode, {_LOG}) for mode in _get_current_dispatch_mode_stack())


def alone() -> bool:
    """Whether no dispatch mode, tracer or transform is active: a plain tensor is then nothing else to anybody."""
    active = _stack_len() or _included(_PRE_DISPATCH) or torch._C._functorch.peek_interpreter_stack() is not None
    return not (active or forward_mode() or torch.jit.is_tracing())


def recording() -> bool:
    """Whether something records a graph in which the op can be one node."""
    return get_proxy_mode() is not None


def before_dispatch() -> bool:
    """Whether what records does so before torch's dispatcher, and so before autograd, is asked."""
    return _included(_PRE_DISPATCH)


def transforms() -> frozenset[str]:
    """The modes of the transforms of torch.func that are active, other than functionalize."""
    return frozenset(
        _TRANSFORMS[interpreter.key()]
        for interpreter in retrieve_all_functorch_interpreters()
        if interpreter.key() in _TRANSFORMS
    )


_TRANSFORMS = {TransformType.Vmap: "vmap", TransformType.Jvp: "jvp", TransformType.Grad: "grad"}


def takes_ops(mode: TorchDispatchMode) -> bool:
    """Whether a mode takes any operator whole. Those of torch that count and log say so, and would see nothing."""
    return bool(mode.supports_higher_order_operators) and not _from(mode, _OBSERVERS)


def _from(mode: TorchDispatchMode, modules: Container[str]) -> bool:
    """Whether a mode is of a class in these modules. To import one loads Triton, which takes longer than hopkit."""
    return any(kind.__module__ in modules for kind in type(mode).__mro__)


_LOG = "torch.utils._debug_mode._mode"
_OBSERVERS = frozenset({"torch.utils.flop_counter", "torch.distributed.tensor.debug", _LOG})


def dispatch_modes() -> Iterator[TorchDispatchMode]:
    """The active dispatch modes, innermost first."""
    return reversed(_get_current_dispatch_mode_stack())


def forward_mode() -> bool:
    """Whether dual numbers may be about."""
    return forward_ad._current_level >= 0


def transforming() -> bool:
    """Whether a transform of torch.func is active, other than functionalize."""
    return bool(transforms())


def shapes_only(values: Iterable[object]) -> bool:
    """Whether tensors have shapes here, and no values to decide on."""
    if any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()):
        return True
    return any(map(has_no_value, values))


def has_no_value(value: object) -> bool:
    """Whether this is a tensor that has a shape and nothing else."""
    return isinstance(value, torch.Tensor) and (value.is_meta or isinstance(value, (FakeTensor, FunctionalTensor)))


def mixes_fakes(error: AssertionError) -> bool:
    """Whether torch met a tensor with values among those that have none (torch/_subclasses/fake_tensor.py)."""
    return "convert all Tensors to FakeTensors" in str(error)


def functionalizing() -> bool:
    """Whether AOTAutograd is at work, which wraps all of its inputs."""
    return any(isinstance(mode, FunctionalTensorMode) for mode in _get_current_dispatch_mode_stack())


def recording_ahead() -> bool:
    """Whether AOTAutograd records a graph, under no transform. Where gradients are on, it is a graph that trains."""
    return functionalizing() and get_proxy_mode() is not None and not transforming()


def foreseeing() -> bool:
    """Whether AOTAutograd looks at what it is going to record, under no transform: what it sees then has to be true."""
    return functionalizing() and get_proxy_mode() is None and not transforming()


def tracked() -> Container[torch.Tensor]:
    """The tensors that the active tracer follows."""
    mode = get_proxy_mode()
    return cast("PythonKeyTracer", mode.tracer).tensor_tracker if mode is not None else ()


def is_tracked(value: object) -> bool:
    """Whether the tensor came in through a tracer, and is no constant to it."""
    return isinstance(value, torch.Tensor) and isinstance(base(value), (FunctionalTensor, FakeTensor))


def autocasting() -> bool:
    """Whether autocast is on, for any device."""
    return bool(torch._C._is_any_autocast_enabled())


def overridden() -> bool:
    """Whether a torch-function mode is active that wants to see the inside of an op: anybody's but a tracer's."""
    return any(
        isinstance(mode, DeviceContext) or not type(mode).__module__.startswith(("torch.", "hopkit."))
        for mode in _get_current_function_mode_stack()
    )


def only_device(values: Iterable[object]) -> str:
    """The device type of all these tensors, or "" where they have several, no values, or more to them than values."""
    devices: set[str] = set()
    for value in values:
        if isinstance(value, torch.Tensor):
            ordinary = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
            devices.add(value.device.type if ordinary and not (value.is_nested or value.is_meta) else "")
    return devices.pop() if len(devices) == 1 else ""


def ordinary(value: object, *, meta: bool) -> bool:
    """Whether the tensors in a pytree are torch's own. What cannot be told quickly is not.

    Args:
        value: The pytree.
        meta: Whether those without values are, too.
    """
    kind = type(value)
    if kind in trees.TENSORS:
        return meta or not cast("torch.Tensor", value).is_meta
    if kind is tuple or kind is list:
        items = cast("Sequence[object]", value)
        if trees.TENSORS.issuperset(map(type, items)):
            return meta or not any(map(_is_meta, items))
        return all(ordinary(item, meta=meta) for item in items)
    if kind is dict:
        return all(ordinary(item, meta=meta) for item in cast("dict[object, object]", value).values())
    return not isinstance(value, torch.Tensor) and not trees.is_node(kind)


_is_meta = operator.attrgetter("is_meta")


def foreign(value: object) -> bool:
    """Whether this is a tensor subclass, or a transform's tensor of one, that wants to see the inside of an op."""
    return isinstance(value, torch.Tensor) and type(base(value)) not in _KNOWN


def beyond_recording(leaves: Iterable[object]) -> bool:
    """Whether one of these operands has no stand-in of hopkit's, or a tracer of another kind is at work."""
    return torch.jit.is_tracing() or any(
        isinstance(leaf, torch.fx.Proxy)
        or (isinstance(leaf, torch.Tensor) and ((leaf.is_nested and leaf.layout is torch.strided) or _packed(leaf)))
        for leaf in leaves
    )


def _packed(tensor: torch.Tensor) -> bool:
    return tensor.is_quantized or tensor.is_mkldnn


def opaque(value: object) -> bool:
    """Whether this is a tensor subclass that torch cannot take apart: what it holds, no recorder sees as an input."""
    return isinstance(value, torch.Tensor) and type(value) not in _KNOWN and not is_traceable_wrapper_subclass(value)


_KNOWN = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def symbolic(inputs: object) -> bool:
    """Whether torch.fx traces symbolically, as it does to unpickle a graph: it takes an operator as it stands."""
    return trees.holds((torch.fx.Proxy,), (inputs,))
