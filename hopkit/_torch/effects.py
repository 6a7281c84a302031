"""Effects in order: AOTAutograd threads a token through them (torch/_higher_order_ops/effects.py, 2.13 and 2.14).

If that is gone, the nodes of ops that have an effect are kept, in the order in which they were written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch._ops import HigherOrderOperator
from torch._subclasses.functional_tensor import PythonFunctionalizeAPI
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from hopkit._torch import functional
from hopkit._torch.fakes import unfunctional


def threaded(layer: functional.Functionalizer) -> bool:
    """Whether there is a token to thread. There is none in a graph within a graph, and none but AOTAutograd's."""
    from torch._higher_order_ops.effects import _EffectType  # loaded with torch's compiler

    if not functional.by_mode(layer) or functional.inside():
        return False
    mode, tracing = cast("PythonFunctionalizeAPI", layer).mode, get_proxy_mode()
    if tracing is None:
        return mode._allow_token_discovery
    token = mode._tokens.get(_EffectType.ORDERED)
    return token is not None and unfunctional(token) in tracing.tracer.tensor_tracker


def call(
    layer: functional.Functionalizer,
    operator: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> object:
    """The outputs of an operator, after all that had an effect before; for where a token is `threaded`.

    While something is recorded, the graphs among ``args`` are part of it already.
    """
    from torch._higher_order_ops import effects

    mode, target = cast("PythonFunctionalizeAPI", layer).mode, cast("HigherOrderOperator", operator)
    # torch knows what has an effect by its name, which another op may get.
    known = effects._register_effectful_op(target, effects._EffectType.ORDERED)
    effects._EFFECTFUL_HOPS_WITH_SCHEMA.add(target)
    try:
        discover = mode._allow_token_discovery
        return cast("object", effects.handle_effects(discover, mode._tokens, target, args, dict(kwargs)))
    finally:
        effects._EFFECTFUL_HOPS_WITH_SCHEMA.discard(target)
        known.destroy()
