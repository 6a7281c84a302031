"""What an op costs under torch.compile, against the same model with nothing of hopkit in it. Ratios: op / inline.

Run it with ``python -m tests.benchmarks.compile``; it takes some ten minutes. Parts are ``steps``, ``outline`` and
``sizes``: ``python -m tests.benchmarks.compile steps``.

To reach: step time, peak memory and saved bytes 1.05 under Inductor and under aot_eager; as many kernels, and 1.02 of
the run time, forward and training, under Inductor; an outlined model of 24 layers compiles in 0.40 of the time; no
recompilation over a range of sizes.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hopkit._torch.inductor import counting, written
from tests import models
from tests.benchmarks.timing import compare, table

LAYERS = 24
FORMS: dict[str, Callable[[], models.Through]] = {
    "inline": lambda: models.inline,
    "single": models.single,
    "composite": models.composite,
    "outline": lambda: models.single(outline=True),
}


class Called(nn.Module):
    """A block in one of its forms."""

    def __init__(self, block: nn.Module, through: models.Through) -> None:
        super().__init__()
        self.block, self.through = block, through

    def forward(self, x: Tensor) -> Tensor:
        return self.through(self.block, x)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "transformer": (lambda: models.Transformer(256, 4), (4, 128, 256), ("single", "composite")),
    "convolutions": (lambda: models.Residual(32), (8, 32, 32, 32), ("single",)),
}


def steps() -> None:
    """Time, memory and kernels of one block."""
    rows = []
    for name, (make, shape, forms) in BLOCKS.items():
        torch.manual_seed(0)
        block, x = make(), torch.randn(*shape)
        for backend in ("inductor", "aot_eager"):
            for form in forms:
                torch.compiler.reset()
                ways = {
                    side: torch.compile(Called(block, FORMS[side]()), backend=backend, fullgraph=True)
                    for side in ("inline", form)
                }
                trained = {side: _step(way, x) for side, way in ways.items()}
                with torch.no_grad():
                    forward = _ratio(_times({side: functools.partial(way, x) for side, way in ways.items()}), form)
                training = _ratio(_times(trained), form)
                saved = _ratio({side: _saved_bytes(way, x) for side, way in ways.items()}, form)
                peak = _ratio({side: _peak_bytes(step) for side, step in trained.items()}, form)
                counts = _kernels(block, form, x) if backend == "inductor" else "-"
                rows.append((name, form, backend, forward, training, saved, peak, counts))
    print(table(("block", "op", "backend", "forward", "training", "saved", "peak", "kernels op:inline"), rows))


def _step(way: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    return lambda: way(leaf).square().mean().backward()


def _times(ways: Mapping[str, Callable[[], object]]) -> Mapping[str, float]:
    return compare(ways, seconds=0.1, timer=time.process_time)


def _ratio(measured: Mapping[str, float], form: str) -> str:
    return f"{measured[form] / measured['inline']:.3f}"


def _saved_bytes(way: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """How much is kept from forward to backward, besides parameters and inputs."""
    leaf = x.clone().requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage() is not leaf.untyped_storage():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {t.untyped_storage().data_ptr() for t in (leaf, *getattr(way, "parameters", list)())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = way(leaf)
    total = sum(size for where, size in kept.items() if where not in own)
    del result
    return total


def _peak_bytes(step: Callable[[], object]) -> float:
    """The most that is allocated at a time during one step, over what was allocated before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def _kernels(block: nn.Module, form: str, x: Tensor) -> str:
    """How many kernels are written, and called, forward and in training."""
    found = []
    for side in (form, "inline"):
        torch.compiler.reset()
        with torch.no_grad():
            _, forward = written(torch.compile(Called(block, FORMS[side]()), fullgraph=True), x)
        torch.compiler.reset()
        _, training = written(_step(torch.compile(Called(block, FORMS[side]()), fullgraph=True), x))
        found.append("+".join(_counted(code) for code in (forward, training)))
    return f"{found[0]}:{found[1]}"


def _counted(code: str) -> str:
    return str(len(re.findall(r"async_compile\.(?:cpp_pybinding|triton)\(", code)))


def outline() -> None:
    """How long a deep model takes to compile, each time in a new process with empty caches."""
    rows = []
    for training in (False, True):
        best: dict[str, dict[str, float]] = {}
        for _ in range(2):
            for side in ("inline", "outline"):
                found = _in_new_process(side, training)
                best[side] = {key: min(value, best.get(side, found)[key]) for key, value in found.items()}
        inline, op = best["inline"], best["outline"]
        rows.append(
            (
                "training" if training else "forward",
                f"{inline['wall']:.1f}",
                f"{op['wall'] / inline['wall']:.2f}",
                f"{inline['cpu']:.1f}",
                f"{op['cpu'] / inline['cpu']:.2f}",
                int(op["regions"]),
                f"{max(inline['error'], op['error']):.1e}",
            )
        )
    print(f"{LAYERS} layers, one region per layer")
    print(table(("", "inline s", "ratio", "inline cpu s", "cpu ratio", "regions compiled", "largest error"), rows))


def _in_new_process(side: str, training: bool) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.compile", "one", side, str(int(training))]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(side: str, training: bool) -> dict[str, float]:
    """Compile a deep model; seconds, how many regions were written, and the largest error of values and gradients."""
    torch.manual_seed(0)
    model, tokens = models.Gpt(LAYERS, FORMS[side]()), torch.randint(0, 64, (2, 16))
    torch.compile(lambda x: x.sin() + 1)(torch.ones(3))  # what is imported once is nobody's
    torch.compiler.reset()
    plain = models.Gpt(LAYERS, models.inline)
    plain.load_state_dict(model.state_dict())

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            result = function(tokens)
        if training:
            result.square().mean().backward()
        return [result.detach()]

    compiled = torch.compile(model, fullgraph=True)
    start, before = time.perf_counter(), _cpu_seconds()
    got, code = written(run, compiled)
    wall, cpu = time.perf_counter() - start, _cpu_seconds() - before
    want = run(plain)
    pairs: list[tuple[Any, Any]] = list(zip(cast("list[Tensor]", got), want, strict=True))
    if training:
        pairs += [(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)
    regions = len(re.findall(r"^def model_\w+\(", code, flags=re.MULTILINE))
    return {"wall": wall, "cpu": cpu, "regions": regions, "error": error}


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def sizes() -> None:
    """How often a range of sizes is compiled anew, after the first two sizes."""
    rows = []
    for form in ("inline", "single", "composite", "outline"):
        torch.compiler.reset()
        compiled: list[object] = []
        model = models.Gpt(2, FORMS[form]())
        run = torch.compile(model, backend=counting("inductor", compiled), fullgraph=True)
        for length in (8, 12):
            run(torch.randint(0, 64, (2, length))).square().mean().backward()
        first = len(compiled)
        for length in range(13, 29):
            run(torch.randint(0, 64, (2, length))).square().mean().backward()
        rows.append((form, first, len(compiled) - first))
    print(table(("form", "graphs for 2 sizes", "for 16 more"), rows))


PARTS: dict[str, Callable[[], None]] = {"steps": steps, "outline": outline, "sizes": sizes}


def main() -> None:
    """Print the tables."""
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(sys.argv[2], sys.argv[3] == "1")))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        print(f"torch {torch.__version__}, one thread")
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()


if __name__ == "__main__":
    main()
