"""A rule for somebody else's op: logs how long it takes to propagate shapes through a graph of constants."""

from __future__ import annotations

import logging
import time

import torch

from hopkit.extend import Decline, OpSpec, Rule, hookimpl

log = logging.getLogger("hopkit_example")


@hookimpl(op="constgraph_run")
def hopkit_fake_rule(op: OpSpec) -> Rule:  # noqa: ARG001 - the hook's own; this answer is for one op alone
    """Answers for ``constgraph_run`` in the mode ``fake``."""
    return timed


def timed(graph: torch.fx.GraphModule, args: tuple[object, ...]) -> object:
    """The op's fake rule; it has the signature of the op's body."""
    if not log.isEnabledFor(logging.DEBUG):
        raise Decline("nobody reads the log")
    start = time.perf_counter()
    result = graph(*args)
    log.debug("shapes of %d nodes in %.1f ms", len(graph.graph.nodes), 1e3 * (time.perf_counter() - start))
    return result
