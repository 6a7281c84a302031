"""Stand-ins: tensors with shapes and no values, in a fake mode of hopkit's own."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack, temporarily_restore_interpreter_stack
from torch._guards import detect_fake_mode
from torch._higher_order_ops.utils import suspend_functionalization
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
    transform_subclass,
)

from hopkit._torch import sizes, trees
from hopkit._torch.autograd import computed, tied, unhooked
from hopkit._torch.levels import cleared
from hopkit._torch.state import dispatch_modes

FakeMode = FakeTensorMode

_rehearsing: contextvars.ContextVar[bool] = contextvars.ContextVar("hopkit.rehearsing", default=False)

_effectless: contextvars.ContextVar[bool] = contextvars.ContextVar("hopkit.effectless", default=False)
_levels: contextvars.ContextVar[Sequence[object]] = contextvars.ContextVar("hopkit.levels", default=())
"""The levels of torch.func around the stage, which are off on it."""


class _WithMemory(TorchDispatchMode):
    """Gives zeros for a tensor of zeros that has no memory."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.ops.aten._efficientzerotensor.default:
            func = torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))


def zeros_have_memory() -> contextlib.AbstractContextManager[object]:
    """Inside, torch makes tangents of zeros that have memory: a view of a stand-in without it is no stand-in.

    That is ATen's own ``view`` of such tensors (2.13, 2.14). Here are no values: ``0 * inf`` is then something else.
    """
    return _WithMemory()  # type: ignore[no-untyped-call] # torch's own


def zeros_of_stand_ins() -> contextlib.AbstractContextManager[object]:
    """As `zeros_have_memory`, if what runs inside runs on stand-ins and nothing records it."""
    shapes = any(isinstance(mode, FakeTensorMode) for mode in dispatch_modes())
    return zeros_have_memory() if shapes and get_proxy_mode() is None else contextlib.nullcontext()


class Stage:
    """Where a body is rehearsed: nothing records, nothing is computed, and every tensor made inside is known.

    Its fake mode is its own, so that a tensor from outside is told from one that was made inside by asking whose it is.
    """

    def __init__(self, inputs: Iterable[object]) -> None:
        outer = detect_fake_mode([unfunctional(t) for t in inputs if isinstance(t, torch.Tensor)])
        self._shapes = (outer.shape_env if outer else None) or sizes.new_environment()
        self.mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)

    @contextlib.contextmanager
    def open(self, *, gradients: bool = True, rehearsal: bool = True) -> Iterator[None]:
        """Inside, the body may run: no tracer, transform or functionalization sees it.

        Args:
            gradients: Whether they are on. A subgraph may differentiate something itself, also below autograd.
            rehearsal: Whether ops inside are rehearsed with it, and not recorded: their bodies run.
        """
        with (
            suspend_functionalization(),
            cleared() as levels,
            _disable_current_modes(),
            _no_function_modes(),
            autograd_on(),
            torch.inference_mode(False),  # what is made there cannot be saved for a gradient
            torch.set_grad_enabled(gradients),
            unhooked(),
            self._shapes.ignore_fresh_unbacked_symbols(),
            self.mode,
            zeros_have_memory(),
        ):
            token, level = _rehearsing.set(rehearsal), _levels.set(levels)
            try:
                yield
            finally:
                _levels.reset(level)
                _rehearsing.reset(token)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was made on this stage."""
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode is self.mode
        if is_traceable_wrapper_subclass(tensor):
            # A name may stand for what is no tensor: a DTensor has its mesh.
            parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            return all(self.owns(part) for part in parts if isinstance(part, torch.Tensor))
        return False

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stand-in of the same size, stride, dtype, device and ``requires_grad``. Call it inside `open`."""
        return stand_in(tensor, self.mode)

    def stand_in(self, value: object) -> object:
        """A stand-in, if this is a tensor from outside."""
        return self.fake(value) if isinstance(value, torch.Tensor) and not self.owns(value) else value

    def plain(self, value: object) -> object:
        """A stand-in of one item, where ``value`` is what a transform of torch.func makes of many."""
        wrapped = isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value)
        return self.fake(cast("torch.Tensor", value)) if wrapped else value

    def unknown(self, kind: str) -> int:
        """A number of this type that nobody knows."""
        return sizes.unknown(self._shapes, kind)


@contextlib.contextmanager
def left(mode: FakeTensorMode) -> Iterator[None]:
    """Off the stage for a while: what runs inside runs as around the rehearsal, and new symbols of ``mode`` count."""
    levels = _levels.get()
    token, level = _rehearsing.set(False), _levels.set(())  # nothing is left to restore
    effects = _effectless.set(False)
    shapes = mode.shape_env
    ignored = shapes._ignore_fresh_unbacked_symbols_set(False) if shapes else False
    try:
        with _disable_current_modes(), _no_function_modes(), temporarily_restore_interpreter_stack(list(levels)):
            yield
    finally:
        if shapes:
            shapes._ignore_fresh_unbacked_symbols_set(ignored)
        _effectless.reset(effects)
        _levels.reset(level)
        _rehearsing.reset(token)


@contextlib.contextmanager
def without_effects(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, no op with an effect may be called: it would be part of a node that has none."""
    token = _effectless.set(wanted)
    try:
        yield
    finally:
        _effectless.reset(token)


def effectless() -> bool:
    """Whether what is rehearsed is to be a node without an effect."""
    return _effectless.get()


def rehearsing() -> bool:
    """Whether a body is being rehearsed."""
    return _rehearsing.get()


@contextlib.contextmanager
def _no_function_modes() -> Iterator[None]:
    """Without the modes of tracers, and without those of a recording that this one is nested in."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


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
    with (
        torch._C.DisableTorchFunction(),
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch.no_grad(),
    ):
        wanted, parameter = tensor.requires_grad, isinstance(tensor, torch.nn.Parameter)
        tensor = unfunctional(tensor)
        if type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor) and tensor.layout is torch.strided:
            with mode:
                fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            if (
                isinstance(tensor, FakeTensor)
                and tensor.fake_mode.shape_env is mode.shape_env
                and fake.is_floating_point()
            ):
                # What stands for its one number: with dynamic=True Dynamo has a tensor for every float that may change.
                # An integer is the user's tensor: who counts by its number decides on a value.
                cast("FakeTensor", fake).item_memo = _known_item(tensor)
        elif is_traceable_wrapper_subclass(tensor) and not tensor.is_nested:
            # torch's own looks for the levels of torch.func, which are off, and for a gradient that a part may not ask.
            fake = transform_subclass(tensor, lambda _, part: _part(part, mode)).detach()
        else:
            # Of what is no leaf torch would ask for the gradient, and warn of that.
            tensor = tensor if tensor.is_leaf else tensor.detach()
            with mode, torch.inference_mode(tensor.is_inference()):  # its stand-in has a version, or none, as it has
                fake = mode.from_tensor(tensor, static_shapes=True).detach()
        if parameter:
            fake._is_param = True  # code may ask
        return fake.requires_grad_(wanted)


def _part(part: object, mode: FakeTensorMode) -> torch.Tensor:
    """What stands for a part of a subclass. It need not be a tensor, whatever torch says: a DTensor has its mesh."""
    return stand_in(part, mode) if isinstance(part, torch.Tensor) else cast("torch.Tensor", part)


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A new stand-in, which says of itself what ``tensor`` does, and was computed if it requires a gradient."""
    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return computed(fake.requires_grad_()) if tensor.requires_grad else fake


def _known_item(tensor: FakeTensor) -> torch.SymInt | torch.SymFloat | torch.SymBool | None:
    """The symbol of a tensor's one number, if that is an input's: such a one is good in every epoch of a fake mode."""
    if tensor.is_inference():  # it has no version, and torch keeps no number of it
        return None
    held = vars(tensor)
    item = held.get("_item_memo") if held.get("_item_memo_vc") == tensor._version else None
    return item if isinstance(item, sizes.SYMBOLIC) and not sizes.unbacked(item) else None


def in_mode(value: object, mode: FakeTensorMode) -> object:
    """``value``, a fake of ``mode`` if it is a tensor."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or is_traceable_wrapper_subclass(value):
        return value
    return mode.from_tensor(value, static_shapes=True)


def run_in_mode(run: Callable[[], object], mode: FakeTensorMode) -> object:
    """What ``run`` gives in ``mode``. Sizes that come up inside and are not returned are no outputs of an operator."""
    shapes = mode.shape_env
    before = len(shapes.pending_fresh_unbacked_symbols) if shapes else 0
    with mode, autograd_on(), unhooked():
        result = run()
    if shapes:
        shapes.ignorable_fresh_unbacked_symbols.extend(shapes.pending_fresh_unbacked_symbols[before:])
    return result


def among(inputs: Sequence[object], run: Callable[[], object]) -> object:
    """What ``run`` gives, `bound` and as `run_in_mode` has it, if these inputs are in a fake mode."""
    mode = detect_fake_mode([unfunctional(t) for t in inputs if isinstance(t, torch.Tensor)])
    return bound(run_in_mode(run, mode), inputs) if mode else run()


def bound(result: object, inputs: Sequence[object]) -> object:
    """``result`` with a symbol of its own for every size like ``u0 + 1`` where no other is ``u0``.

    torch knows a symbol by an input or an output that is this symbol and nothing else (``compute_unbacked_bindings``).
    """
    numbers = [n for n in sizes.numbers(trees.leaves(result)) if sizes.unbacked(n)]
    if not numbers or get_proxy_mode() is not None:  # then there are values, or every operator is its own
        return result
    hidden = sizes.symbols(numbers) - sizes.symbols([*inputs, *(n for n in numbers if str(n).isidentifier())])
    known = {str(n): n for n in numbers if not sizes.symbols([n]) & hidden}

    def number(n: object) -> object:
        if not sizes.unbacked(n):
            return n
        if str(n) not in known:
            known[str(n)] = sizes.another(n)
        return known[str(n)]

    def leaf(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return number(value)
        # Where only the first size is unknown, as it mostly is, no stride is.
        if not sizes.symbols([value]) & hidden or sizes.symbols(value.stride()) & hidden:
            return value
        shape = cast("tuple[int, ...]", tuple(map(number, value.shape)))
        return tied(torch.empty_strided(shape, value.stride(), dtype=value.dtype, device=value.device), [value])

    return trees.map_leaves(leaf, result) if hidden else result


def autograd_on() -> contextlib.AbstractContextManager[None]:
    """Lets autograd see what runs inside, also in a rule that torch entered below autograd."""
    return _asked(_AUTOGRAD_KEYS)


def transforms_on() -> contextlib.AbstractContextManager[None]:
    """Lets torch.func work inside, also in a kernel that torch entered from within a dispatch mode."""
    return _asked(_FUNC_KEYS)


@contextlib.contextmanager
def _asked(keys: torch._C.DispatchKeySet) -> Iterator[None]:
    """Inside, the kernels of these keys are asked."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - keys):
        yield


def _autograd_keys() -> torch._C.DispatchKeySet:
    before = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._AutoDispatchBelowAutograd():
        return torch._C._dispatch_tls_local_exclude_set() - before


_AUTOGRAD_KEYS = _autograd_keys()


_FUNC_KEYS = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchGradWrapper)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
)


def together(values: Sequence[object]) -> list[object]:
    """``values`` with stand-ins of one mode: in the metadata of a graph that was traced on values, each has its own."""
    if len({id(value.fake_mode) for value in values if isinstance(value, FakeTensor)}) < 2:
        return list(values)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return [stand_in(value, mode) if isinstance(value, torch.Tensor) else value for value in values]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that can be written to in the tensor's stead: it has the same strides."""
    copy = tensor.clone()
    if copy.stride() == tensor.stride():
        return copy
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def same_storage(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two stand-ins share memory."""
    if not torch._C._has_storage(left) or not torch._C._has_storage(right):  # sparse tensors hold tensors instead
        return left is right
    return bool(left.untyped_storage()._cdata == right.untyped_storage()._cdata)
