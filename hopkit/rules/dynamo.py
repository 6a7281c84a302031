"""dynamo: one node per call, whose subgraphs are what Dynamo read, their captures among the node's inputs."""

from __future__ import annotations

from hopkit.extend import OpSpec, Rule, hookimpl
from hopkit.extend.dynamo import record


@hookimpl
def hopkit_dynamo_rule(op: OpSpec) -> Rule:
    """The same rule for every op."""
    return record
