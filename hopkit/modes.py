"""The table of modes: every situation in which torch can call an op, in the order in which torch asks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mode:
    """One situation in which torch can call an op.

    Args:
        name: An identifier. The mode's hook is called ``hopkit_<name>_rule``.
        entry: Where torch enters. Built-in modes name it for the reader; a mode that a plugin adds gives the
            ``TorchDispatchMode`` class, the ``torch.Tensor`` subclass or the ``DispatchKey`` itself.
        gives: What a rule of this mode must give, in one sentence.
        default: What answers where no rule was written: "derived" (from the body) or "decomposing" (the body runs
            in the mode, and the op vanishes).
        open: Whether plugins and authors may supply rules for it.
        in_place: For a tensor class alone: a rule takes the place of the body, on the author's arguments, as the body
            runs in eager on tensors of this class: ``rule(entry, *args, **kwargs)``. It is not asked while something
            records or transforms; the body runs then, as it does where there is no rule.
    """

    name: str
    entry: object
    gives: str
    default: str = "derived"
    open: bool = True
    in_place: bool = False


BUILTIN = (
    Mode("dynamo", "torch.compile, strict export", "one node in Dynamo's graph per call"),
    Mode("vmap", "TransformType.Vmap", "the op whose body is vmap(body)"),
    Mode("jvp", "TransformType.Jvp", "the op whose body is jvp(body)"),
    Mode("grad", "TransformType.Grad", "as autograd, in torch.func", open=False),
    Mode("autograd", "DispatchKey.Autograd", "first and second derivatives, captures included"),
    Mode("functionalize", "FunctionalTensorMode", "the op without mutation, its subgraphs made pure"),
    Mode("proxy", "ProxyTorchDispatchMode", "one node in the graph per call"),
    Mode("fake", "FakeTensorMode", "shapes, strides, dtypes and devices, without running a kernel"),
    Mode("inductor", "torch._inductor's lowering", "the code that Inductor writes"),
    Mode("device", "DispatchKey.CompositeExplicitAutograd", "the value"),
    Mode("user_mode", "TorchDispatchMode", "the inside of the op", "decomposing", open=False),
    Mode("subclass", "__torch_dispatch__", "the inside of the op", "decomposing", open=False),
)
