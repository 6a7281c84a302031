"""Run a program, and judge it: the op under its stack against the body in plain eager PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import linecache
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from random import Random
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

import hopkit
from hopkit._torch import trees
from hopkit._torch.snapshot import changed, forget_numbers, snapshot
from hopkit.testing import fresh
from hopkit.testing.compare import Pair, difference
from tests.fuzz import flow, pieces
from tests.fuzz.program import Held, Layer, Program, generate, smaller, source
from tests.fuzz.ruled import ruled
from tests.fuzz.stacks import DERIVED, WEIGHTS, floats, shapes_of_real, stacked, takes_ops, weighed

Verdict = Literal["right", "refused", "n/a", "wrong", "error"]
Build = dict[str, Any]

LEFT = "left behind"

SILENT = frozenset({"traced", "retraced", "flattened", "ahead", "compiled", "exported", "functionalized", "linearized"})
"""Layers that rewrite what is computed: what a dispatch mode sees there is theirs."""


RECORDED = frozenset({"traced", "retraced", "flattened", "exported"})
"""Layers that record with make_fx."""

TRANSFORMED = frozenset({"vmap", "grad", "vjp", "jvp", "jacrev", "linearized"})
"""Layers of torch.func."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of a program.

    Args:
        verdict: "refused": a HopkitError where the body works. "n/a": torch cannot run the stack on the body, or gives
            something else itself.
        kind: What kind of refusal or failure.
        told: The message.
        program: One that fails the same way, if a smaller one was looked for.
    """

    verdict: Verdict
    kind: str = ""
    told: str = ""
    program: Program | None = None

    def of(self, program: Program) -> Finding:
        """This finding, of a program that is as small as can be."""
        return dataclasses.replace(self, program=program)

    @property
    def failed(self) -> bool:
        return self.verdict in ("wrong", "error")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave: its result, whether its tensors require gradients, and gradients of operands and captures."""

    value: object
    flags: list[bool]
    gradients: list[Tensor]


def program(seed: str) -> Program:
    """The program of a seed: the first that runs in plain PyTorch. One that starts with "flow" has control flow."""
    drawn = (
        _drawn(Random(f"{seed}/{number}" if number else seed), flowing=seed.startswith("flow"))
        for number in itertools.count()
    )
    return next(filter(_runs, drawn))


def _runs(made: Program) -> bool:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            _run(made, _build(made, plain=True), visible=True)
        except Exception:
            return False
    return True


def _drawn(random: Random, *, flowing: bool) -> Program:
    made = generate(random, WEIGHTS, flowing=flowing)
    made = dataclasses.replace(made, stack=_possible(made.stack, ruled=bool(made.rules)))
    names = [name for name, *_ in made.stack]
    chance = random.random()
    if chance < 0.06 and not flowing:
        return dataclasses.replace(made, stack=(("shapes", 0, 0), *made.stack[: random.randrange(2)]), rules=())
    if chance < 0.2 and not flowing and SILENT.isdisjoint(names) and not any(map(takes_ops, made.stack)):
        return dataclasses.replace(made, stack=(("watched", 0, 0), *made.stack[:3]), rules=())
    return made


def _possible(stack: Sequence[Layer], *, ruled: bool) -> tuple[Layer, ...]:
    """The stack without what torch itself cannot do, whatever runs in it; or, if ``ruled``, whatever is saved in it."""
    outside: set[str] = set()
    kept: list[Layer] = []
    for name, a, b in stack:
        if name == "subclass" and "functionalized" in outside:
            continue  # it ends the process
        if name in RECORDED and outside & {"ahead", "functionalized"}:
            continue  # it takes their tensors for constants
        if name in RECORDED and outside & TRANSFORMED and (outside & SILENT or name == "flattened"):
            continue  # the same, and what is made of the recording has stand-ins for them
        if name == "linearized" and outside & (TRANSFORMED | {"backward"}):
            continue  # torch's own gives memory that nobody has written to
        if name == "linearized" and outside & {"functionalized", "inference"}:
            continue  # not of what does not depend on the input; nor, where nothing is constant, of what is linear
        if name == "functionalized" and "exported" in outside:
            continue  # not of any operator
        if name in TRANSFORMED and "exported" in outside and outside & (RECORDED - {"exported"}):
            continue  # what is recorded there are constants of the exported program
        if name == "functionalized" and {"subclass", "compiled"} <= outside:
            continue  # Dynamo has no stand-ins for their tensors
        if name == "inference" and outside & RECORDED and outside & {"jvp", "jacrev", "linearized", "duals"}:
            continue  # no operator runs there
        if name == "duals" and outside & TRANSFORMED and outside & RECORDED:
            continue  # the same, and who differentiates constants has what they were computed from by chance
        if name == "flattened" and "compiled" in outside:
            continue  # hopkit.flatten is no code to compile
        if name == "compiled" and "functionalized" in outside:
            b &= ~1  # AOTAutograd does not functionalize again
        if ruled and name == "functionalized" and outside & {"ahead", "compiled"}:
            b &= ~1  # AOTAutograd has no jvp of views of part of a memory; copies would be made of them here
        if ruled and name == "subclass" and outside & TRANSFORMED:
            continue  # no operator runs on what it holds
        if ruled and name == "backward" and "checkpointed" in outside:
            continue  # no transform of torch.func works there, and rules are made of them
        if ruled and name == "checkpointed" and outside & (TRANSFORMED | {"functionalized", "duals"}):
            continue  # it computes again when they are over, and nothing is saved then
        mixed = name in ("traced", "retraced") and outside & (TRANSFORMED | {"exported"})
        kept.append((name, a, 0 if mixed else b))  # it gives stand-ins where it traces with them
        outside.add(name)
    return tuple(kept)


def judge(program: Program) -> Finding:
    """Run a program."""
    body = _build(program, plain=True)
    try:
        want = _run(program, body, visible=True)
    except Exception as error:
        return Finding("n/a", "the body", _line(error))
    with fresh() as kit, flow.known(kit):
        op = _build(program, plain=False)
        before = snapshot()
        try:
            got = _run(program, op)
        except Exception as error:
            if left := changed(before):
                return _left(left)
            return _raised(program, error)
    if left := changed(before):
        return _left(left)
    told = _difference(got, want, program)
    return _differs(program, got, want, told) if told else Finding("right")


def plainly(program: Program) -> None:
    """Run the body under the stack, without hopkit, and end the process: 1 if something is left behind."""
    before = snapshot()
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        _run(program, _build(program, plain=True))
    sys.exit(bool(changed(before)))


def _left(left: str) -> Finding:
    return Finding("error", f"{LEFT}: {left.split(' was ')[0]}", left)


def _raised(program: Program, error: Exception) -> Finding:
    refusal: BaseException | None = error
    while refusal is not None and not isinstance(refusal, hopkit.HopkitError):
        refusal = refusal.__cause__ or refusal.__context__
    try:
        _run(program, _build(program, plain=True))
    except Exception as without:
        return Finding("n/a", "torch", _line(without))
    if refusal is not None:
        return Finding("refused", f"{type(refusal).__name__}: {refusal.found.split(':')[0]}", str(refusal))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/hopkit/" in frame.filename]
    where = f" at {frames[-1].filename.rpartition('/hopkit/')[2]}:{frames[-1].name}" if frames else ""
    return Finding("error", f"{type(error).__name__}{where}", "".join(traceback.format_exception(error)))


def _differs(program: Program, got: Result, want: Result, told: str) -> Finding:
    try:
        without = _run(program, _build(program, plain=True))
    except Exception as error:
        return Finding("n/a", "torch", _line(error))
    if not _difference(got, without, program):
        return Finding("n/a", "torch gives something else too", told)
    if theirs := _difference(without, want, program):
        return Finding("n/a", "torch gives something else, and hopkit another", f"{told}; without hopkit {theirs}")
    if "vmap" in program.rules and not _difference(_narrow(got), _narrow(want), program):
        return Finding("n/a", "torch's vmap takes a batch of numbers for a tensor, which has its own dtype", told)
    if "wrong by" in told and _rounded(program, got, want):
        return Finding("right", "but for rounding", told)
    return Finding("wrong", told.split(" has ")[0], told)


def _narrow(result: Result) -> Result:
    return Result(
        trees.map_only(Tensor, Tensor.float, result.value), result.flags, [*map(Tensor.float, result.gradients)]
    )


def _rounded(program: Program, got: Result, want: Result) -> bool:
    """Whether, in single precision, ``got`` is about as near to the same in double precision as ``want`` is."""

    def wide(many: Sequence[Held]) -> tuple[Held, ...]:
        return tuple(dataclasses.replace(h, dtype=h.dtype.replace("float32", "float64")) for h in many)

    double = dataclasses.replace(program, operands=wide(program.operands), captures=wide(program.captures))
    exact = _run(double, _build(double, plain=True), visible=True)
    leaves = (_floats(result) for result in (got, want, exact))
    return all(_distance(g, e) <= 10 * _distance(w, e) for g, w, e in zip(*leaves, strict=True) if w.dtype != e.dtype)


def _floats(result: Result) -> list[Tensor]:
    leaves = trees.leaves((result.value, result.gradients))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _distance(t: Tensor, exact: Tensor) -> float:
    return float((t.double() - exact).norm()) if t.numel() else 0.0


def _difference(got: Result, want: Result, program: Program) -> str:
    names = {name for name, *_ in program.stack}
    flags = want.flags
    if program.flowing:  # in plain PyTorch all that could happen happens
        flags = got.flags
    elif not SILENT.isdisjoint(names) or "autograd" in program.rules:  # either may ask for a gradient of zeros
        flags = [asked or zeros for asked, zeros in zip(want.flags, got.flags, strict=True)]
    rough = "autocast" in names
    strides = names.isdisjoint(DERIVED) and "vmap" not in program.rules and not program.flowing
    try:
        pairs = [
            Pair("the value", _rough(got.value, rough), _rough(want.value, rough), strides=strides),
            Pair("requires_grad", got.flags, flags),
            Pair("a gradient", _rough(got.gradients, rough), _rough(want.gradients, rough), strides=False),
        ]
        if rough:
            pairs.append(Pair("the value", got.value, want.value, values=False, strides=strides))
        return next((told for _, told in map(difference, pairs) if told), "")
    except Exception as error:
        return f"what cannot be compared ({_line(error)})"


def _rough(value: object, rough: bool) -> object:
    # Under autocast a result is a product of rounded ones.
    return trees.map_only(Tensor, lambda t: (t.detach().float() / 8).to(torch.bfloat16), value) if rough else value


def _run(program: Program, built: Build, *, visible: bool = False) -> Result:
    forget_numbers()
    call, operands, stack = built["call"], built["operands"], program.stack
    run: Callable[..., object]
    if visible and stack and stack[0][0] == "shapes":
        run = shapes_of_real(stacked(call, stack[1:], visible=True))
    else:
        run = stacked(call, stack, visible=visible)
    value = run(*operands)
    results = floats(value)
    sources = [t for t in _sources(built) if t.requires_grad]
    gradients: Sequence[Tensor] = [torch.zeros_like(t) for t in sources]
    if sources and any(t.requires_grad for t in results):
        with torch.enable_grad():
            total = weighed(results)
        gradients = torch.autograd.grad(total, sources, allow_unused=True, materialize_grads=True)
    return Result(
        trees.map_only(Tensor, torch.Tensor.detach, value), [t.requires_grad for t in results], list(gradients)
    )


def _sources(built: Build) -> Iterator[Tensor]:
    yield from built["operands"]
    for name, value in built.items():
        if name[:1] == "c" and name[1:].isdigit():
            yield value
        elif isinstance(value, torch.nn.Module):
            yield from value.parameters()


_numbers = itertools.count()


def _build(program: Program, *, plain: bool) -> Build:
    text, name = source(program), f"<fuzz {'body' if plain else 'op'} {abs(hash(program))}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    number = next(_numbers)
    module = ModuleType(f"tests.fuzz.program_{number}")  # Dynamo imports it, and what has a name only once
    built: Build = vars(module)
    sys.modules[module.__name__] = module
    sys.modules.pop(f"tests.fuzz.program_{number - 2}", None)
    built |= {name: value for name, value in vars(pieces).items() if not name.startswith("__")}
    built |= {"torch": torch, "Any": Any, "Subgraph": hopkit.Subgraph, "ruled": ruled}
    built |= flow.named(plain=plain)
    built["define"] = (lambda name: lambda body: body) if plain else hopkit.define
    exec(compile(text, name, "exec"), built)
    linecache.cache.pop(name)
    return built


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """A program that does not end is a failure like any other."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it ran for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def found(program: Program) -> Finding:
    """As `judge`, with nothing left of it: no warning, no compiled code."""
    with warnings.catch_warnings(), torch.random.fork_rng(), limited(60):
        warnings.simplefilter("ignore")
        try:
            return judge(program)
        except Exception as error:  # a program that cannot be judged at all
            return Finding("error", f"{type(error).__name__} in the fuzzer", "".join(traceback.format_exception(error)))
        finally:
            if any(name in ("compiled", "exported") for name, *_ in program.stack):
                torch.compiler.reset()


def shrunk(program: Program, finding: Finding, tries: int = 80) -> Program:
    """The simplest program that can be found which fails in the same way."""
    again = True
    while again:
        again = False
        for candidate in smaller(program):
            tries -= 1
            if tries < 0:
                return program
            other = found(candidate)
            if (other.verdict, other.kind) == (finding.verdict, finding.kind):
                program, again = candidate, True
                break
    return program
