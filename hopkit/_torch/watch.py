"""What a subgraph does while it runs: which tensors from outside it uses, what it writes to, whether it is random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hopkit._torch import trees
from hopkit._torch.fakes import same_storage


class Substitute(TorchFunctionMode):
    """Puts one tensor in the place of another wherever Python code inside uses it: closure conversion, live."""

    def __init__(self, replace: Callable[[object], object]) -> None:
        super().__init__()
        self.replace = replace
        self.steps: list[object] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        leaves, tree = trees.flatten((args, dict(kwargs or {})))
        self.steps.append((func, tuple(leaf for leaf in leaves if type(leaf) in _PLAIN)))
        replaced = [self.replace(leaf) if isinstance(leaf, _REPLACED) else leaf for leaf in leaves]
        args, named = cast("tuple[tuple[object, ...], dict[str, object]]", trees.unflatten(replaced, tree))
        return func(*args, **named)


_REPLACED = (torch.Tensor, torch.SymInt, torch.SymFloat)
_PLAIN = (int, float, bool, str, complex)


class Watch(TorchDispatchMode):
    """Sees every operator that runs inside, and passes it on."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.random = False
        self.opaque = ""
        self.written: list[torch.Tensor] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self.opaque = "a part of it runs without gradients"
        if isinstance(func, torch._ops.OpOverload):
            self.random |= torch.Tag.nondeterministic_seeded in func.tags
            if func._schema.is_mutable:
                self.written.extend(_writes(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def wrote_to(self, tensor: torch.Tensor) -> bool:
        """Whether something inside wrote to the memory of ``tensor``."""
        return any(same_storage(tensor, w) for w in self.written)


def _writes(
    func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> Iterator[torch.Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (t for t in trees.leaves(value) if isinstance(t, torch.Tensor))


def custom_backward(outputs: Sequence[object]) -> str:
    """Why the autograd graph behind ``outputs`` cannot be had from the operators alone, or ""."""
    pending = [t.grad_fn for t in outputs if isinstance(t, torch.Tensor)]
    seen: set[object] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return f"it has a backward of its own ({type(node).__name__.removesuffix('Backward')})"
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
    return ""
