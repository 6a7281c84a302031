"""``python -m tests.fuzz --count N --seed S``: run programs; print the count, refusals by kind, and what failed."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import gc
import logging
import sys
import time

from tests.fuzz.judge import Finding, found, program, shrunk
from tests.fuzz.program import Program, source


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", default="0", help="program number i is that of the seed SEED:i")
    parser.add_argument("--start", type=int, default=0, help="the first number")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--show", action="store_true", help="print every program and what came of it")
    parser.add_argument("--refusals", type=int, default=0, help="so many examples of each kind of refusal")
    parser.add_argument("--failures", type=int, default=3, help="so many examples of each kind of failure")
    given = parser.parse_args()
    faulthandler.enable()
    logging.disable()  # torch writes pages about what it then raises
    verdicts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    start, done, failures = time.perf_counter(), 0, 0
    for number in range(given.start, given.start + given.count):
        if time.perf_counter() - start > given.seconds:
            break
        seed, done = f"{given.seed}:{number}", done + 1
        made = program(seed)
        if given.show:
            print(f"{seed}\n{made}\n{source(made)}", flush=True)
        finding = found(made)
        verdicts[finding.verdict] += 1
        if given.show:
            print(finding.verdict, finding.kind, finding.told)
        if finding.verdict != "right":
            kinds[f"{finding.verdict}: {finding.kind}"] += 1
        if finding.failed:
            failures += 1
        seen = kinds[f"{finding.verdict}: {finding.kind}"]
        if (finding.failed and seen <= given.failures) or (finding.verdict == "refused" and seen <= given.refusals):
            print(report(seed, shrunk(made, finding) if seen == 1 else made, finding), flush=True)
        if number % 100 == 99:
            gc.collect()
    print(f"{done} programs of seed {given.seed} from {given.start}, in {time.perf_counter() - start:.0f} s")
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    for kind, count in kinds.most_common():
        print(f"{count:6} {kind}")
    return failures > 0


def report(seed: str, small: Program, finding: Finding) -> str:
    """What to print of a program, so that it can be run again."""
    stack = " > ".join(f"{name}({a}, {b})" for name, a, b in small.stack)
    lines = [f"==== {seed}: {finding.verdict}, {finding.kind}", repr(small), f"# {stack}", source(small)]
    return "\n".join([*lines, "\n".join(finding.told.splitlines()[-12:])])


if __name__ == "__main__":
    sys.exit(main())
