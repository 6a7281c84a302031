"""Inputs of Dynamo's graph that a method of a module gives, which is called before the compiled code runs.

Dynamo takes tensors from where it looked them up, again at every run, and such a place may be the result of a call
(``CallFunctionNoArgsSource``), which is made once (``make_call_generated_code``, torch/_dynamo/codegen.py; 2.13, 2.14).
If one of these is gone, give None: what stands beside is then what Dynamo reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch._dynamo.source import AttrSource, CallFunctionNoArgsSource, GetItemSource
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import unpack_iterable
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import GraphArg
from torch.utils.weak import WeakTensorKeyDictionary

from hopkit._torch.state import alone, autocasting


def inputs(
    tx: InstructionTranslatorBase,
    given: VariableTracker,
    look: str,
    take: str,
    uses: Callable[[], Iterable[torch.Tensor]],
) -> VariableTracker | None:
    """The tuple of tensors that ``module.take()`` gives, without gradients and without autocast.

    None: the code would not compute these here, as far as seen, because it may have changed the module before; or
    gradients, autocast or a transform are on, or a graph is to be exported.

    Args:
        tx: Dynamo's own.
        given: The module.
        look: The name of what gives the same, for guards.
        take: The name of what is called before the code runs.
        uses: Gives what these are computed from.
    """
    output, module, source = tx.output, getattr(given, "value", None), given.source
    exporting = output.export or torch.compiler.is_exporting()
    if torch.is_grad_enabled() or autocasting() or exporting or output.current_tracer.parent is not None or not alone():
        return None
    if source is None or not isinstance(module, torch.nn.Module) or _changed(tx, module):
        return None
    try:
        tensors = getattr(module, look)()
    except Exception:  # what stands beside fails in the same way, and where it belongs
        return None
    if tensors is None or _written(output.graphargs, uses()):
        return None
    looked, taken = (CallFunctionNoArgsSource(AttrSource(source, name)) for name in (look, take))
    result: VariableTracker = VariableTracker.build(tx, tensors, looked)
    for item in unpack_iterable(tx, result):
        item.realize()
    for arg in output.graphargs:
        if arg.fake_tensor is not None and isinstance(arg.source, GetItemSource) and arg.source.base == looked:
            arg.source = GetItemSource(taken, arg.source.index)
            # Another thread may write to a weight while Dynamo reads on.
            arg.example_strong_ref = tensors[arg.source.index]
            _memory[arg.fake_tensor] = _storage(arg.fake_tensor)
    return result


_memory = WeakTensorKeyDictionary()
"""Where the memory of a stand-in of what was taken is."""


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(arguments: Iterable[GraphArg], used: Iterable[torch.Tensor]) -> bool:
    """Whether the code may have written to what is used, or has to what it took here before."""
    storages = set(map(_storage, used))
    for arg in arguments:
        value, fake = arg.example, arg.fake_tensor
        if not isinstance(value, torch.Tensor) or fake is None or arg.pass_arg_as_tensor:
            continue
        if fake in _memory and (fake.is_inference() or fake._version or _memory[fake] != _storage(fake)):
            return True
        if value.layout is not torch.strided or _storage(value) in storages:
            return True
    return False


def _changed(tx: InstructionTranslatorBase, module: torch.nn.Module) -> bool:
    """Whether a part of a module is not any more what it was when the code began."""
    effects = tx.output.side_effects
    holders = [h for part in module.modules() for h in (part, part._parameters, part._buffers, part._modules)]
    return any(holder in effects and effects.is_modified(effects[holder]) for holder in holders)
