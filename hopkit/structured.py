"""What a body decides on values, as nodes that Inductor knows: torch's own ``cond``, ``while_loop`` and ``scan``.

In plain eager, and whatever else records, a body decides in Python. Where Inductor is to compile it, both ways are
recorded, as graphs of the tensors that they take and of those that they close over, and so are their derivatives.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch.fx import GraphModule

from hopkit._torch import levels, sizes, structured, trees
from hopkit._torch.autograd import Step, apply, differentiable, needs_gradient
from hopkit._torch.casts import casting, casts
from hopkit._torch.fakes import Stage, rehearsing
from hopkit._torch.functional import memory
from hopkit._torch.products import Products
from hopkit._torch.structured import Flat, Tensors, Unstructured
from hopkit._torch.watch import Substitute, replaced
from hopkit.transform import vjp

T = TypeVar("T")
C = TypeVar("C")
X = TypeVar("X")
Y = TypeVar("Y")


def own(result: T, inputs: Sequence[object]) -> T:
    """``result``, contiguous, with a copy of every tensor that shares memory with an input or with another output.

    A graph is made before it is known which way an op goes. What comes out must be of one layout, and be the op's own,
    whichever way that is.

    Args:
        result: A pytree of tensors.
        inputs: Pytrees of what it may share memory with.
    """
    taken = set(map(_memory, trees.tensors(list(inputs))))

    def owned(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.contiguous()
        if _memory(leaf) in taken:
            leaf = leaf.clone(memory_format=torch.contiguous_format)
        taken.add(_memory(leaf))
        return leaf

    return trees.map_leaves(owned, result)


def _memory(tensor: torch.Tensor) -> object:
    found = memory(levels.base(tensor))
    return id(tensor) if found is None else found


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What there is of a tensor before it is computed."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def stacked(self, length: int) -> _Kind:
        return _Kind(torch.Size((length, *self.shape)), self.dtype, self.device)


class Closed:
    """Functions of the same arguments, as functions of tensors alone: of the arguments', and of captured ones.

    Args:
        functions: Each gives a pytree, whose leaves but for tensors are always the same.
        args: Pytrees of tensors.
    """

    def __init__(self, functions: Sequence[Callable[..., object]], args: Sequence[object]) -> None:
        self._functions, self._casts = functions, casts()
        # A function around this one may be recorded now, with others in the place of what it closes over.
        self._leaves, self._tree = trees.flatten(replaced(tuple(args)))
        self.operands = tuple(trees.tensors(self._leaves))
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        stage = Stage(self.operands)

        def note(value: object) -> object:
            if not isinstance(value, torch.Tensor) or stage.owns(value):
                return value
            return found.setdefault(id(value), (value, stage.fake(value)))[1]

        with stage.open():
            with Substitute(note) as mode:
                inside = self._arguments(list(map(stage.fake, self.operands)))
                results = [mode.replaced(function(*inside)) for function in functions]
            self.results = [trees.map_leaves(_kind, result) for result in results]
        self._outside = tuple(value for value, _ in found.values())
        self.captured = replaced(self._outside)

    def _arguments(self, tensors: Sequence[object]) -> tuple[object, ...]:
        return cast("tuple[object, ...]", trees.unflatten(_filled(self._leaves, tensors), self._tree))

    def flat(self, number: int) -> Flat:
        """Function number ``number``, of the operands and what is captured. Its tensors are its own, and contiguous."""
        count = len(self.operands)

        def run(values: Sequence[object]) -> Sequence[object]:
            new = dict(zip(map(id, self._outside), values[count:], strict=True))
            with casting(self._casts), Substitute(lambda value: new.get(id(value), value)) as mode:
                result = mode.replaced(self._functions[number](*self._arguments(values[:count])))
            return trees.tensors(own(result, [list(values)]))

        return run

    def result(self, number: int, tensors: Sequence[object]) -> object:
        """These tensors in the place of those that function number ``number`` gives."""
        leaves, tree = trees.flatten(self.results[number])
        return trees.unflatten(_filled(leaves, tensors), tree)

    def stand_ins(self, number: int) -> object:
        """What function number ``number`` gives, without values."""
        return trees.map_leaves(_empty, self.results[number])


def _filled(leaves: Sequence[object], tensors: Sequence[object]) -> list[object]:
    rest = iter(tensors)
    return [next(rest) if isinstance(leaf, (torch.Tensor, _Kind)) else leaf for leaf in leaves]


def _kind(leaf: object) -> object:
    return _Kind(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def _empty(leaf: object) -> object:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, _Kind) else leaf


def _same_kind(left: object, right: object) -> None:
    (some, tree), (others, other_tree) = trees.flatten(left), trees.flatten(right)
    if tree != other_tree or some != others:
        raise Unstructured("one way gives something else than the other")


def choose(decides: object, yes: Callable[..., T], no: Callable[..., T], operands: Sequence[object]) -> T:
    """``(yes if decides else no)(*operands)``, where Inductor compiles it as one node that has both.

    Args:
        decides: A number, or a tensor of one element, the same for all items of a batch.
        yes: Gives a pytree of tensors.
        no: Gives one of the same structure, shapes, dtypes and devices.
        operands: Pytrees of tensors. The functions may close over others, and write to none of them.
    """
    decides = replaced(decides)
    if not (structured.compiling() and structured.unknown(decides)):
        return (yes if decides else no)(*operands)
    closed = Closed((yes, no), operands)
    _same_kind(*closed.results)
    if rehearsing():
        return cast("T", closed.stand_ins(0))
    inputs = own((*closed.operands, *closed.captured), ())  # torch's nodes take no tensor twice
    found = _chosen(cast("torch.Tensor", decides).bool().reshape(()), (closed.flat(0), closed.flat(1)), inputs)
    return cast("T", closed.result(0, found))


def _chosen(decides: torch.Tensor, ways: Sequence[Flat], inputs: Sequence[object]) -> tuple[object, ...]:
    if needs_gradient(inputs):
        return apply(_Choice(decides, ways, inputs), inputs)
    yes, no = (structured.trace(way, inputs) for way in ways)
    return structured.cond(decides, yes, no, inputs)


def _pulled(run: Flat, wrt: Sequence[int], given: Sequence[int]) -> Flat:
    """The derivative of ``run``, as `vjp` has it, that gives contiguous tensors of its own."""
    pull = vjp(lambda values: tuple(run(values)), wrt, given)
    return lambda values: own(pull(values), [list(values)])


def _wanted(values: Sequence[object]) -> list[int]:
    return [i for i, v in enumerate(values) if differentiable(v) and cast("torch.Tensor", v).requires_grad]


def _of_inputs(count: int, wrt: Sequence[int], found: Sequence[object]) -> list[torch.Tensor | None]:
    """The gradients ``found`` of the inputs ``wrt``, among those of all ``count`` inputs."""
    results: list[torch.Tensor | None] = [None] * count
    for i, gradient in zip(wrt, found, strict=True):
        results[i] = cast("torch.Tensor", gradient)
    return results


class _Choice(Step):
    """One of two functions, as one step of the tape. Backward computes the one that was taken again."""

    repeats = True

    def __init__(self, decides: torch.Tensor, ways: Sequence[Flat], inputs: Sequence[object]) -> None:
        self._decides, self._ways, self._wrt = decides, ways, _wanted(inputs)

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        yes, no = (structured.trace(way, inputs, again=True) for way in self._ways)
        return structured.cond(self._decides, yes, no, inputs), inputs

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        given = [i for i, gradient in enumerate(gradients) if gradient is not None]
        ways = [_pulled(way, self._wrt, given) for way in self._ways]
        found = _chosen(self._decides, ways, (*saved, *(gradients[i] for i in given)))
        return _of_inputs(len(saved), self._wrt, found)


def loop(going: Callable[[T], object], step: Callable[[T], T], state: T) -> T:
    """``while going(state): state = step(state)``, where Inductor compiles it as one node; gives the last state.

    Args:
        going: Gives a number, or a tensor of one element. Under vmap an item that is done stays as it is.
        step: Gives the next state.
        state: A pytree of tensors. A step gives one of the same structure, shapes, dtypes and devices.
    """
    goes = going(state)
    if _stays(goes):
        return _kept(going, step, state)
    while levels.anywhere(goes):
        following = step(state)
        state = chosen(cast("torch.Tensor", goes), following, state) if levels.batched(goes) else following
        goes = going(state)
    return state


def chosen(decides: torch.Tensor, yes: T, no: T) -> T:
    """For every item of a batch, ``yes`` or ``no``, which are alike.

    Args:
        decides: Of one element, which differs from item to item.
        yes: A pytree of tensors.
        no: One of the same structure, shapes and dtypes.
    """
    left, tree = trees.flatten(yes)
    pairs = zip(left, trees.leaves(no), strict=True)
    return cast("T", trees.unflatten([torch.where(decides != 0, a, b) if a is not b else a for a, b in pairs], tree))  # type: ignore[call-overload]


def _stays(going: object) -> bool:
    if not isinstance(going, torch.Tensor) or not structured.compiling():
        return False
    return structured.unknown(going) or structured.loops_are_whole()


def _kept(going: Callable[[T], object], step: Callable[[T], T], state: T) -> T:
    closed = Closed((going, step), (state,))
    _same_kind(closed.results[1], trees.map_leaves(_kind, state))
    if rehearsing():
        return cast("T", closed.stand_ins(1))

    def goes(values: Sequence[object]) -> Sequence[object]:
        (found,) = cast("Sequence[torch.Tensor]", closed.flat(0)(values))
        return (found.bool().reshape(()),)

    return cast("T", closed.result(1, _looped(goes, closed.flat(1), closed.operands, closed.captured)))


def _looped(goes: Flat, step: Flat, state: Sequence[torch.Tensor], captured: Sequence[object]) -> Sequence[object]:
    state, captured = own((tuple(state), tuple(captured)), ())
    inputs = (*state, *captured)
    if needs_gradient(inputs):
        return apply(_Trips(goes, step, len(state), inputs), inputs)[: len(state)]
    return structured.while_loop(structured.trace(goes, inputs), structured.trace(step, inputs), state, captured)


class _Trips(Step):
    """A loop as one step of the tape. It gives the last state, and what backward starts from: all the states.

    Backward is a loop, too. It computes a step again from the state before it.
    """

    repeats = True

    def __init__(self, goes: Flat, step: Flat, count: int, inputs: Sequence[object]) -> None:
        self._goes, self._step, self._count = goes, step, count
        # A state may come to depend on what is captured.
        self._states = [i for i, value in enumerate(inputs[:count]) if differentiable(value)]
        self._captured = [i for i in _wanted(inputs) if i >= count]

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        count = self._count
        values = (cast("torch.Tensor", inputs[0]).new_zeros((), dtype=torch.int64), *inputs)

        def counted(values: Sequence[object]) -> Sequence[object]:
            return (cast("torch.Tensor", values[0]) + 1, *self._step(values[1:]))

        goes = structured.trace(lambda values: self._goes(values[1:]), values)
        stacks = structured.while_stacked(
            goes, structured.trace(counted, values, again=True), values[: count + 1], values[count + 1 :]
        )
        outputs = (*(stack[-1].clone() for stack in stacks[1:]), *stacks)
        return outputs, (*inputs, *stacks)

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        count, states, wrt = self._count, self._states, self._captured
        stop = len(saved) - count - 1
        inputs, (trips, *stacks) = saved[:stop], cast("Sequence[torch.Tensor]", saved[stop:])
        # In a second derivative every state has a gradient of its own, besides that of the last.
        along = {i: g for i in states if (g := gradients[count + 1 + i]) is not None}
        before = [
            torch.cat([cast("torch.Tensor", x).unsqueeze(0), s[:-1]])
            for x, s in zip(inputs[:count], stacks, strict=True)
        ]
        pull = _pulled(self._step, [*states, *wrt], states)

        def back(values: Sequence[object]) -> Sequence[object]:
            rest = iter(cast("Sequence[torch.Tensor]", values))
            number = next(rest)
            slopes = {i: next(rest) for i in states}
            sums = [next(rest) for _ in wrt]
            at = [next(rest).index_select(0, number.reshape(1)).squeeze(0) for _ in range(count)]
            for i in along:
                slopes[i] = slopes[i] + next(rest).index_select(0, number.reshape(1)).squeeze(0)
            found = cast("Sequence[torch.Tensor]", pull((*at, *rest, *slopes.values())))
            added = (a + b for a, b in zip(sums, found[len(states) :], strict=True))
            return (number - 1, *found[: len(states)], *added)

        start = [
            torch.zeros_like(cast("torch.Tensor", inputs[i])) if gradients[i] is None else gradients[i] for i in states
        ]
        zeros = [torch.zeros_like(cast("torch.Tensor", inputs[i])) for i in wrt]
        state = cast("Sequence[torch.Tensor]", [trips[-1] - 1, *start, *zeros])
        captured = (*before, *along.values(), *inputs[count:])
        _, *found = _looped(lambda values: (cast("torch.Tensor", values[0]) >= 0,), back, state, captured)
        results = _of_inputs(len(inputs), [*states, *wrt], found)
        for i, gradient in along.items():  # without a trip, the stack is the first state
            results[i] = cast("torch.Tensor", results[i]) + torch.where(trips[-1] == 0, gradient[0], 0)
        return results


def sweep(step: Callable[[C, X], tuple[C, Y]], carry: C, xs: X, *, reverse: bool = False) -> tuple[C, Y]:
    """``carry, y = step(carry, x)`` for every slice ``x`` of ``xs`` in the first dimension; gives the last carry, and
    every ``y``, stacked in the first dimension in the order of ``xs``.

    Args:
        step: Gives a carry that is like the one that it gets, and a pytree of tensors and numbers.
        carry: A pytree of tensors.
        xs: A pytree of tensors, all of the same size in the first dimension, at least one.
        reverse: From the last slice to the first.
    """
    leaves, tree = trees.flatten(xs)
    tensors = cast("list[torch.Tensor]", leaves)
    if structured.compiling() and structured.loops_are_whole():
        return cast("tuple[C, Y]", _swept(step, carry, tensors, tree, reverse))
    ys = []
    for slices in zip(*(reversed(x.unbind()) if reverse else x.unbind() for x in tensors), strict=True):
        carry, y = step(carry, cast("X", trees.unflatten(slices, tree)))
        ys.append(trees.leaves(y))
    _, tree = trees.flatten(y)
    stacks = [torch.stack([*map(torch.as_tensor, many[::-1] if reverse else many)]) for many in zip(*ys, strict=True)]
    return carry, cast("Y", trees.unflatten(stacks, tree))


def _swept(
    step: Callable[..., tuple[object, object]],
    carry: object,
    xs: Sequence[torch.Tensor],
    tree: trees.Tree,
    reverse: bool,
) -> object:
    def stacked(carry: object, x: Sequence[object]) -> object:
        following, y = step(carry, trees.unflatten(x, tree))
        return following, trees.map_leaves(torch.as_tensor, y)

    closed = Closed((stacked,), (carry, [x[0] for x in xs]))
    if sizes.numbers([*xs, *closed.operands, *closed.captured]):
        raise Unstructured("Inductor does not find the sizes that are in the middle of a sweep")
    given = cast("tuple[object, _Kind]", closed.results[0])
    _same_kind(given[0], trees.map_leaves(_kind, carry))
    if rehearsing():
        return trees.map_leaves(
            _empty, (given[0], trees.map_leaves(lambda y: cast("_Kind", y).stacked(len(xs[0])), given[1]))
        )
    count = len(closed.operands) - len(xs)
    found = _along(closed.flat(0), closed.operands[:count], [x.flip(0) if reverse else x for x in xs], closed.captured)
    ys = [cast("torch.Tensor", y).flip(0) if reverse else y for y in found[count:]]
    return closed.result(0, [*found[:count], *ys])


More = Callable[[GraphModule], Sequence[torch.Tensor]]
"""Changes the graph of a step; gives what it takes then, besides, slice by slice."""


def _along(
    step: Flat,
    carry: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    captured: Sequence[object],
    more: More | None = None,
) -> Sequence[object]:
    carry, xs, captured = own((tuple(carry), tuple(xs), tuple(captured)), ())
    inputs = (*carry, *xs, *captured)
    if needs_gradient(inputs):
        sweeping = _Sweep(step, len(carry), len(xs), inputs)
        outputs = apply(sweeping, inputs)
        return outputs[: len(outputs) - len(carry)]
    return _scanned(step, carry, xs, captured, more=more)


def _scanned(
    step: Flat,
    carry: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    captured: Sequence[object],
    *,
    again: bool = False,
    more: More | None = None,
) -> Sequence[object]:
    if not carry:  # Inductor takes no scan of a single result

        def idling(values: Sequence[object]) -> Sequence[object]:
            return own((values[0], *step(values[1:])), [list(values)])

        return _scanned(idling, [xs[0].new_zeros(())], xs, captured, again=again, more=more)[1:]
    graph = structured.trace(step, (*carry, *(x[0] for x in xs), *captured), again=again)
    return structured.scan(graph, carry, [*xs, *(more(graph) if more else ())], captured)


class _Sweep(Step):
    """A sweep as one step of the tape. It gives the last carry, what is stacked, and every carry that a step got.

    Backward is a sweep the other way. It computes a step again from the carry that it got, but for its `Products`.
    """

    repeats = True

    def __init__(self, step: Flat, carries: int, xs: int, inputs: Sequence[object]) -> None:
        self._step, self._count, self._stop, self._products = step, carries, carries + xs, Products()
        # A carry may come to depend on what else the step takes.
        self._carries = [i for i, value in enumerate(inputs[:carries]) if differentiable(value)]
        wanted = [i for i in _wanted(inputs) if i >= carries]
        self._xs = [i for i in wanted if i < self._stop]
        self._captured = [i for i in wanted if i >= self._stop]
        self._wrt = [*self._carries, *self._xs, *self._captured]

    def forward(self, inputs: tuple[object, ...]) -> tuple[tuple[object, ...], tuple[object, ...]]:
        carry, xs, captured = self._parts(inputs)

        def noting(values: Sequence[object]) -> Sequence[object]:
            return own((*self._step(values), *values[: self._count]), [list(values)])

        def keeping(graph: GraphModule) -> Sequence[torch.Tensor]:
            pull = functools.partial(_pulled, self._step, self._wrt)
            self._products.keep(graph, pull, idle=not carry, others=self._count)
            return ()

        outputs = tuple(_scanned(noting, carry, xs, captured, again=True, more=keeping))
        stop = len(outputs) - len(self._products)
        return outputs[:stop], (*inputs, *outputs[stop - self._count :])

    def _parts(self, inputs: tuple[object, ...]) -> tuple[Tensors, Tensors, Tensors]:
        tensors = cast("Tensors", inputs)
        return tensors[: self._count], tensors[self._count : self._stop], tensors[self._stop :]

    def backward(
        self, saved: tuple[object, ...], gradients: tuple[torch.Tensor | None, ...]
    ) -> Sequence[torch.Tensor | None]:
        stop = len(saved) - self._count - len(self._products)
        inputs, rest = saved[:stop], cast("Sequence[torch.Tensor]", saved[stop:])
        before, products = rest[: self._count], rest[self._count :]
        carry, xs, captured = self._parts(inputs)
        stop = len(gradients) - self._count
        stacked = {i: g for i, g in enumerate(gradients[:stop]) if i >= self._count and g is not None}
        along = {i: g for i in self._carries if (g := gradients[stop + i]) is not None}
        pull = _pulled(self._step, self._wrt, [*self._carries, *stacked])
        counts = [len(self._carries), len(self._captured), len(before), len(xs), len(stacked), len(along)]

        def back(values: Sequence[object]) -> Sequence[object]:
            rest = iter(cast("Sequence[torch.Tensor]", values))
            slopes, sums, at, x, slopes_of_y, more = ([*itertools.islice(rest, size)] for size in counts)
            found = [*cast("Sequence[torch.Tensor]", pull((*at, *x, *rest, *slopes, *slopes_of_y)))]
            for i, slope in zip(along, more, strict=True):
                found[self._carries.index(i)] = found[self._carries.index(i)] + slope
            middle = len(slopes) + len(self._xs)
            return (*found[: len(slopes)], *map(torch.add, sums, found[middle:]), *found[len(slopes) : middle])

        start = [torch.zeros_like(carry[i]) if (g := gradients[i]) is None else g for i in self._carries]
        start += [torch.zeros_like(cast("torch.Tensor", inputs[i])) for i in self._captured]
        slices = [part.flip(0) for part in (*before, *xs, *stacked.values(), *along.values())]

        def spared(graph: GraphModule) -> Sequence[torch.Tensor]:
            first, last = max(1, len(start)), len(stacked) + len(along)
            roles = [*[None] * first, *range(self._stop), *[None] * last, *range(self._stop, len(inputs))]
            return [products[i].flip(0) for i in self._products.spare(graph, roles, first + len(slices))]

        found = cast("Sequence[torch.Tensor]", _along(back, start, slices, captured, spared))
        results = _of_inputs(len(inputs), [*self._carries, *self._captured, *self._xs], found)
        for i in self._xs:
            results[i] = cast("torch.Tensor", results[i]).flip(0)
        return results
