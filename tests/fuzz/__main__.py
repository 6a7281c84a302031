"""``python -m tests.fuzz --count N --seed S``: run programs; print the count, refusals by kind, and what failed."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from hopkit._torch.snapshot import changed, snapshot
from tests.fuzz.judge import LEFT, Finding, found, plainly, program, shrunk
from tests.fuzz.program import Program, source

FORK = multiprocessing.get_context("fork")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", default="0", help="program number i is that of the seed SEED:i")
    parser.add_argument("--start", type=int, default=0, help="the first number")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--refusals", type=int, default=0, help="show so many examples of each kind of refusal")
    parser.add_argument("--failures", type=int, default=3, help="show so many examples of each kind of failure")
    given = parser.parse_args()
    logging.disable()  # torch writes pages about what it then raises
    torch.set_num_threads(1)  # it has none to lose when it forks
    verdicts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    start, done, failures = time.perf_counter(), 0, 0
    for seed, finding in findings([f"{given.seed}:{i}" for i in range(given.start, given.start + given.count)]):
        done += 1
        verdicts[finding.verdict] += 1
        failures += finding.failed
        if finding.verdict != "right":
            kinds[f"{finding.verdict}: {finding.kind}"] += 1
        seen = kinds[f"{finding.verdict}: {finding.kind}"]
        if (finding.failed and seen <= given.failures) or (finding.verdict == "refused" and seen <= given.refusals):
            print(report(seed, finding), flush=True)
        if time.perf_counter() - start > given.seconds:
            break
    print(f"{done} programs of seed {given.seed} from {given.start}, in {time.perf_counter() - start:.0f} s")
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    for kind, count in kinds.most_common():
        print(f"{count:6} {kind}")
    return failures > 0


def findings(seeds: list[str]) -> Iterator[tuple[str, Finding]]:
    """What comes of the programs of these seeds. torch ends the process over some: then another one goes on."""
    while seeds:
        receiver, sender = FORK.Pipe(duplex=False)
        worker = FORK.Process(target=_work, args=(seeds, sender))
        worker.start()
        sender.close()
        done = 0
        try:
            while True:
                finding = receiver.recv()
                theirs = finding.kind.startswith(LEFT) and _alone(seeds[done])
                yield seeds[done], dataclasses.replace(finding, verdict="n/a") if theirs else finding
                done += 1
        except EOFError:
            pass
        finally:
            worker.join(5)
            worker.kill()
            worker.join()
        seeds = seeds[done:]
        if seeds and worker.exitcode:
            kind, code = "the process ended", _alone(seeds[0])
            yield seeds[0], Finding("n/a" if code else "error", kind, f"{kind} (with the body: {code})")
            seeds = seeds[1:]


def _work(seeds: list[str], sender: Connection) -> None:
    shown, before = set[str](), snapshot()
    for number, seed in enumerate(seeds):
        made = program(seed)
        finding = found(made)
        dirty = bool(changed(before))
        if finding.verdict in ("wrong", "error", "refused") and not dirty and finding.kind not in shown:
            shown.add(finding.kind)
            finding = finding.of(shrunk(made, finding))
        sender.send(finding)
        if dirty or changed(before):
            return  # nothing that runs here now can be trusted
        if number % 100 == 99:
            gc.collect()


def _alone(seed: str) -> int | None:
    """How a process ends that runs a program without hopkit: 0 if all is well, and nothing is left behind."""
    worker = FORK.Process(target=plainly, args=(program(seed),))
    worker.start()
    worker.join()
    return worker.exitcode


def report(seed: str, finding: Finding) -> str:
    """What to print of a program, so that it can be run again."""
    small: Program = finding.program or program(seed)
    stack = " > ".join(f"{name}({a}, {b})" for name, a, b in small.stack)
    lines = [f"==== {seed}: {finding.verdict}, {finding.kind}", repr(small), f"# {stack}", source(small)]
    return "\n".join([*lines, "\n".join(finding.told.splitlines()[-14:])])


if __name__ == "__main__":
    sys.exit(main())
