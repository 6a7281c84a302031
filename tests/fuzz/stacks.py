"""The modes and transforms of a stack: each makes, of a function of tensors, another one.

Most change nothing that can be seen, and the plain reference goes without them; the others are `VISIBLE`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from functorch.compile import aot_function, nop  # type: ignore[import-untyped] # torch's own
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import hopkit
from hopkit._torch import trees
from hopkit._torch.fakes import FakeMode, outside_modes
from hopkit._torch.levels import base
from tests.fuzz.program import Layer
from tests.modes import Boxed, Looking, Names, Passing

Run = Callable[..., Any]
"""A function of tensors that gives a pytree."""

Make = Callable[[Run, int, int], Run]

LAYERS: dict[str, Make] = {}
"""What makes a layer, by name."""

WEIGHTS: dict[str, float] = {}
"""How often a layer is drawn."""

VISIBLE: set[str] = set()
"""Layers that change the result."""

DERIVED: set[str] = set()
"""Layers whose results have strides that nobody promises."""


def layer(weight: float, *, visible: bool = False, derived: bool = False) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        LAYERS[make.__name__], WEIGHTS[make.__name__] = make, weight
        VISIBLE.update([make.__name__] if visible or derived else [])
        DERIVED.update([make.__name__] if derived else [])
        return make

    return add


def stacked(run: Run, stack: Sequence[Layer], *, visible: bool = False) -> Run:
    """``run`` under the layers, the first outermost; under the visible ones alone, if asked for."""
    for name, a, b in reversed(stack):
        if not visible or name in VISIBLE:
            run = LAYERS[name](run, a, b)
    return run


# -- helpers ---------------------------------------------------------------------------------------------------------


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in trees.leaves(value) if isinstance(leaf, Tensor)]


def floats(value: object) -> list[Tensor]:
    return [leaf for leaf in tensors(value) if leaf.is_floating_point()]


def weighed(value: object) -> Tensor:
    """One number of all results, none of which it treats like another."""
    # Of a tensor without dimensions, torch's tangent of a product with 0.7 is a double.
    flat = [leaf.float().reshape(-1) for leaf in floats(value)]
    return torch.stack([(leaf * 0.7 + i).sin().sum() for i, leaf in enumerate(flat)]).sum()


def chosen(ts: Sequence[Tensor], mask: int) -> list[int]:
    """Numbers of floating-point inputs, at least one where there are any."""
    every = [i for i, t in enumerate(ts) if is_float(t)]
    return [i for i in every if mask >> i & 1] or every


def of(run: Run, ts: Sequence[Tensor], numbers: Sequence[int], give: Callable[[object], Any]) -> Run:
    """``run`` as a function of some of its inputs."""

    def function(*some: Tensor) -> Any:
        changed = dict(zip(numbers, some, strict=True))
        return give(run(*(changed.get(i, t) for i, t in enumerate(ts))))

    return function


def direction(t: Tensor) -> Tensor:
    # Not of what `t` is: functionalize makes a copy of what is detached, and torch has no derivative of that one.
    return (torch.ones_like(t).cumsum(-1) * 3 + 1).cos()


def others(ts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like these with other values, to record on: what is wrongly taken for a constant is seen then."""
    with outside_modes():
        return [_other(t) if type(t) is Tensor and t.is_floating_point() and base(t) is t else t for t in ts]


def _other(t: Tensor) -> Tensor:
    memory = t.untyped_storage().clone()
    torch.empty(0, dtype=t.dtype).set_(memory).mul_(0.5).add_(0.25)
    other = torch.empty(0, dtype=t.dtype).set_(memory, t.storage_offset(), t.size(), t.stride())
    return other.requires_grad_(t.requires_grad)


# -- layers that change nothing --------------------------------------------------------------------------------------


@layer(2)
def eager(run: Run, a: int, b: int) -> Run:
    return run


@layer(8)
def traced(run: Run, a: int, b: int) -> Run:
    modes: tuple[Literal["real", "fake", "symbolic"], ...] = ("real", "fake", "symbolic", "real")
    return lambda *ts: make_fx(lambda *us: run(*us), tracing_mode=modes[b])(*others(ts))(*ts)


@layer(1)
def retraced(run: Run, a: int, b: int) -> Run:
    def traced_twice(*ts: Tensor) -> Any:
        graph = make_fx(lambda *us: run(*us), tracing_mode=("real", "symbolic")[b % 2])(*others(ts))
        return make_fx(graph)(*others(ts))(*ts)

    return traced_twice


@layer(1)
def flattened(run: Run, a: int, b: int) -> Run:
    return lambda *ts: hopkit.flatten(make_fx(lambda *us: run(*us))(*others(ts)))(*ts)


@layer(4)
def functionalized(run: Run, a: int, b: int) -> Run:
    return lambda *ts: torch.func.functionalize(
        lambda *us: run(*us), remove=("mutations", "mutations_and_views")[b % 2]
    )(*ts)


@layer(2)
def checkpointed(run: Run, a: int, b: int) -> Run:
    return lambda *ts: checkpoint(run, *ts, use_reentrant=False)


@layer(2)
def dispatching(run: Run, a: int, b: int) -> Run:
    return within(lambda: Passing(takes_ops(("dispatching", a, b))), run)


def takes_ops(made: Layer) -> bool:
    """Whether this is a mode that takes an op whole: what one around it sees is not the body's."""
    return made[0] == "dispatching" and made[2] % 4 == 3


@layer(1)
def overriding(run: Run, a: int, b: int) -> Run:
    return within(Looking, run)


def within(mode: Callable[[], contextlib.AbstractContextManager[Any]], run: Run) -> Run:
    def inside(*ts: Tensor) -> Any:
        with mode():
            return run(*ts)

    return inside


@layer(2)
def subclass(run: Run, a: int, b: int) -> Run:
    def boxed(*ts: Tensor) -> Any:
        inputs = [Boxed(t) if a >> i & 1 or i == 0 else t for i, t in enumerate(ts)]
        return trees.map_only(Boxed, lambda t: t.held, run(*inputs))

    return boxed


@layer(0.5)
def ahead(run: Run, a: int, b: int) -> Run:
    def aot(*ts: Tensor) -> Any:
        structure: list[trees.Tree] = []

        def flat(*us: Tensor) -> list[object]:
            leaves, tree = trees.flatten(run(*us))
            structure.append(tree)
            return leaves

        outputs = cast("list[object]", aot_function(flat, fw_compiler=nop)(*ts))
        return trees.unflatten(list(outputs), structure[-1])

    return aot


@layer(0.3)
def compiled(run: Run, a: int, b: int) -> Run:
    return lambda *ts: torch.compile(run, backend=("eager", "aot_eager")[b % 2], dynamic=bool(b // 2))(*ts)


@layer(0.2)
def exported(run: Run, a: int, b: int) -> Run:
    class Model(torch.nn.Module):
        def forward(self, *ts: Tensor) -> Any:
            return run(*ts)

    return lambda *ts: torch.export.export(Model(), tuple(others(ts)), strict=False).module()(*ts)


# -- layers that are seen --------------------------------------------------------------------------------------------


@layer(1.5, visible=True)
def no_grad(run: Run, a: int, b: int) -> Run:
    return within(torch.no_grad, run)


@layer(0.5, visible=True)
def inference(run: Run, a: int, b: int) -> Run:
    return within(torch.inference_mode, run)


@layer(1.5, visible=True)
def autocast(run: Run, a: int, b: int) -> Run:
    return within(functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16), run)


@layer(6, derived=True)
def vmap(run: Run, a: int, b: int) -> Run:
    def batched(*ts: Tensor) -> Any:
        dims = [(b + i) % (t.dim() + 1) if a >> i & 1 or i == 0 else None for i, t in enumerate(ts)]
        values = [t if d is None else torch.stack([t, t * 2 + 1], d) for t, d in zip(ts, dims, strict=True)]
        out: int = -1 if a >= 14 else 0
        chunk = 1 if a == 13 else None
        return torch.vmap(lambda *us: tensors(run(*us)), in_dims=tuple(dims), out_dims=out, chunk_size=chunk)(*values)

    return batched


@layer(4, derived=True)
def grad(run: Run, a: int, b: int) -> Run:
    return lambda *ts: torch.func.grad(lambda *us: weighed(run(*us)), tuple(chosen(ts, a)))(*ts)


@layer(4, derived=True)
def jvp(run: Run, a: int, b: int) -> Run:
    def forward(*ts: Tensor) -> Any:
        some = chosen(ts, a)
        primals, tangents = tuple(ts[i] for i in some), tuple(direction(ts[i]) for i in some)
        return torch.func.jvp(of(run, ts, some, floats), primals, tangents)

    return forward


@layer(3, derived=True)
def vjp(run: Run, a: int, b: int) -> Run:
    def reverse(*ts: Tensor) -> Any:
        some = chosen(ts, a)
        values, pull, *_ = torch.func.vjp(of(run, ts, some, floats), *(ts[i] for i in some))
        return values, cast("Any", pull)([direction(v) for v in values])

    return reverse


@layer(2, derived=True)
def jacrev(run: Run, a: int, b: int) -> Run:
    def jacobian(*ts: Tensor) -> Any:
        some = chosen(ts, a)[:1]
        transform = torch.func.jacfwd if b == 3 else torch.func.jacrev
        return transform(of(run, ts, some, lambda r: weighed(r) if b == 2 else floats(r)))(ts[some[0]])

    return jacobian


@layer(3, derived=True)
def backward(run: Run, a: int, b: int) -> Run:
    """``autograd.grad`` inside; twice, sometimes."""

    def differentiated(*ts: Tensor) -> Any:
        some = chosen(ts, a)
        leaves = [t.detach().requires_grad_() if i in some else t for i, t in enumerate(ts)]
        sources, again = [leaves[i] for i in some], b == 3
        with torch.enable_grad():
            result = run(*leaves)
            first = torch.autograd.grad(
                weighed(result), sources, create_graph=again, allow_unused=True, materialize_grads=True
            )
            if again:
                first = torch.autograd.grad(weighed(first), sources, allow_unused=True, materialize_grads=True)
        return [t.detach() for t in tensors(result)], first

    return differentiated


@layer(1, derived=True)
def duals(run: Run, a: int, b: int) -> Run:
    def dual(*ts: Tensor) -> Any:
        some = chosen(ts, a)
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(t, direction(t)) if i in some else t for i, t in enumerate(ts)]
            pairs = [forward_ad.unpack_dual(t) for t in floats(run(*inputs))]
            return [(p, torch.zeros_like(p) if t is None else t.clone()) for p, t in pairs]

    return dual


@layer(0.5, derived=True)
def linearized(run: Run, a: int, b: int) -> Run:
    def linear(*ts: Tensor) -> Any:
        some = chosen(ts, a)
        values, push = torch.func.linearize(of(run, ts, some, floats), *(ts[i] for i in some))
        return values, push(*(direction(ts[i]) for i in some))

    return linear


@layer(0, visible=True)
def watched(run: Run, a: int, b: int) -> Run:
    """What a dispatch mode sees, as part of the result. Where nothing is recorded, it is the inside of the op."""

    def logged(*ts: Tensor) -> Any:
        with Names() as mode:
            result = run(*ts)
        return result, mode.names

    return logged


@layer(0, visible=True)
def shapes(run: Run, a: int, b: int) -> Run:
    """Stand-ins: outermost, and nothing is left of the result but what it looks like."""

    def fake(*ts: Tensor) -> Any:
        with FakeMode(allow_non_fake_inputs=True) as mode:
            return [_looks(t) for t in tensors(run(*(mode.from_tensor(t) for t in ts)))]

    return fake


def shapes_of_real(run: Run) -> Run:
    """What `shapes` gives, by running."""
    return lambda *ts: [_looks(t) for t in tensors(run(*ts))]


def _looks(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} {[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]}"
