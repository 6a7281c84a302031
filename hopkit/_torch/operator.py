"""The operator that torch sees, and torch's tables of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, cast

import torch
from torch._C import DispatchKey
from torch._C._functorch import TransformType
from torch._ops import HigherOrderOperator, _higher_order_ops
from torch.utils._python_dispatch import TorchDispatchMode

from hopkit._torch import checkpoint, dynamo, levels, state, trees
from hopkit.errors import AutogradError, CallError, RuleError

if TYPE_CHECKING:
    from hopkit._torch.frame import Frame

DispatchMode = TorchDispatchMode
Kernel = Callable[..., object]
Key = DispatchKey | TransformType | type[TorchDispatchMode] | type[torch.Tensor]


_UNNAMED = "???"
"""The name of keys that torch has in C++ alone."""


class Operator(HigherOrderOperator):
    """One op, as torch sees it. What answers under which key is a table that hopkit writes."""

    decides = False  # whether the body decides on values, and cannot be looked into where there are none

    def __init__(
        self,
        name: str,
        enter: Callable[..., object],
        run: Kernel,
        schema: Callable[..., object],
        read: Callable[[Frame], object],
        digest: Callable[[], tuple[str, bool]],
        layout: str,
    ) -> None:
        super().__init__(name)  # type: ignore[no-untyped-call] # torch's own
        self._enter, self._run, self._schema_of, self.read = enter, run, schema, read
        self._digest_of, self._layout = digest, layout  # the keyword of nodes whose outputs are a tuple
        # A view that only conjugates or negates is seen by the body's own operators.
        for key in (DispatchKey.Conjugate, DispatchKey.Negative, DispatchKey.ZeroTensor):
            self.fallthrough(key)  # type: ignore[no-untyped-call] # torch's own

    def __call__(self, /, *args: object, **kwargs: object) -> object:
        """Enter as a graph does: in place where nothing asks for the op, through torch's dispatcher otherwise."""
        return self._enter(*args, **kwargs)

    def redispatch(self, /, *args: object, **kwargs: object) -> object:
        """Through torch's dispatcher: the next key's kernel answers."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-untyped-call] # torch's own

    def dispatch(self, /, dispatch_key: DispatchKey, *args: object, **kwargs: object) -> object:
        """As torch's, but open: a mode, subclass or transform without a kernel sees the inside of the op."""
        if dispatch_key == DispatchKey.FuncTorchDynamicLayerFrontMode and not self._has_transform():
            return self._run(*args, **kwargs)
        if dispatch_key.name == _UNNAMED:
            raise AutogradError(
                f"a derivative of op '{self.__name__}'",
                "was called on a batch of torch's old vmap, which `is_grads_batched=True` is made of",
                why="that vmap knows operators of ATen alone",
                todo="Batch it with `torch.func`: `torch.vmap` of what `torch.func.vjp` gives",
            )
        if dispatch_key == DispatchKey.FuncTorchBatched:
            raise CallError(
                f"op '{self.__name__}'",
                "got a batch of a `torch.vmap` that is over, as what a checkpoint inside it computes again in backward",
                why="nobody batches what is computed of it, in torch either",
                todo="Put the checkpoint around the vmap, or differentiate inside it",
            )
        if dispatch_key == DispatchKey.FuncTorchGradWrapper:  # operators of ATen take what has outlived its level, too
            return self.redispatch(*cast("tuple[object, ...]", trees.map_tensors(levels.living, args)), **kwargs)
        if dispatch_key != DispatchKey.Python:
            return super().dispatch(dispatch_key, *args, **kwargs)  # type: ignore[no-untyped-call] # torch's own
        if self.decides and (state.recording() or state.functionalizing()):
            with checkpoint.taken_whole():
                return self._python(*args, **kwargs)
        return self._python(*args, **kwargs)

    def _python(self, /, *args: object, **kwargs: object) -> object:
        """What a dispatch mode or a tensor subclass gives, or the inside of the op if they take no operator whole."""
        if not self._has_python(args):
            return self._run(*args, **kwargs)
        who = next((type(mode).__qualname__ for mode in state.dispatch_modes()), "a tensor subclass")
        result = super().dispatch(DispatchKey.Python, *args, **kwargs)  # type: ignore[no-untyped-call] # torch's own
        if result is NotImplemented or (self._layout in kwargs and not isinstance(result, (tuple, list))):
            raise RuleError(
                f"{who}, which takes operators on functions whole,",
                f"gave {result!r} for op '{self.__name__}'",
                why="it would be taken for the outputs of the op's node, which are a tuple",
                todo="Let it give what `func(*args, **kwargs)` gives, or not say `supports_higher_order_operators`",
            )
        return result

    def _has_transform(self) -> bool:
        top = torch._C._functorch.peek_interpreter_stack()
        return top.key() in self.functorch_table

    def _has_python(self, args: tuple[object, ...]) -> bool:
        for mode in state.dispatch_modes():
            return type(mode) in self.python_key_table or state.takes_ops(mode)
        kinds = {type(leaf) for leaf in trees.leaves(args) if isinstance(leaf, torch.Tensor)}
        return any(kind in self.python_key_table or kind is torch._subclasses.FakeTensor for kind in kinds)

    def _get_overloaded_args(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[torch.Tensor, ...]:
        """As torch's, at any depth: it looks into one tuple, and a graph without a layout may have nested arguments."""
        tensors = (leaf for leaf in trees.leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        return tuple(tensor for tensor in tensors if torch._C._dispatch_keys(tensor).has("Python"))

    def digest(self) -> str:
        """What the op is today, or "" where nobody can tell. It settles whether torch may cache what it compiles."""
        text, self._cacheable = self._digest_of()
        return text

    def gen_schema(self, /, *args: object, **kwargs: object) -> object:
        """The schema of this call (torch/_higher_order_ops/schema.py)."""
        return self._schema_of(*args, **kwargs)

    def install(self, kernels: Mapping[Key, Kernel]) -> None:
        """Replace every kernel of this operator, in torch's tables and in its dispatch cache.

        A thread that calls it meanwhile meets all of the old kernels or all of the new ones, and never none.
        """
        filled = object.__new__(type(self))
        vars(filled).update(vars(self), _dispatch_cache={}, **{name: {} for name in _TABLES})
        for key, kernel in kernels.items():
            filled.py_impl(key)(kernel)
        vars(self).update({name: vars(filled)[name] for name in (*_TABLES, "non_fallthrough_keys", "_dispatch_cache")})


_TABLES = ("py_kernels", "python_key_table", "functorch_table")


for _entry in (Operator.__call__, Operator.redispatch, Operator.dispatch):  # CompiledAutograd enters in the middle
    dynamo.skip(cast("FunctionType", _entry))


def taken(name: str) -> bool:
    """Whether torch knows an operator of this name."""
    return name in _higher_order_ops


class Place:
    """An operator's entries in torch's tables, and what stood there before."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: HigherOrderOperator | None = _higher_order_ops.get(name)

    def holds(self, operator: Operator) -> bool:
        """Whether ``operator`` is the one of this name: a graph knows it by name alone."""
        return _higher_order_ops.get(self._name) is operator

    def fill(self, operator: Operator | None = None) -> None:
        """Make ``operator`` the one of this name; without one, put back what stood there."""
        entry = operator or self._before
        if entry is None:
            _higher_order_ops.pop(self._name, None)
        else:
            _higher_order_ops[self._name] = entry
        # torch.ops.higher_order keeps, and lists, every attribute that was ever read.
        listed = torch.ops.higher_order._dir
        if vars(torch.ops.higher_order).pop(self._name, None) is not None:
            listed[:] = [name for name in listed if name != self._name]
        if isinstance(entry, Operator):
            dynamo.register(self._name)
        else:
            dynamo.restore(self._name)
