"""The first plugin: `run_const_graph`, torch's own op of that name, made with hopkit and made to work everywhere; and
`fold`, which makes one of all that a model computes from its weights alone, and runs it once.
"""

from hopkit_constgraph.cli import hopkit_add_commands
from hopkit_constgraph.fold import fold, report_of
from hopkit_constgraph.folded import module_of
from hopkit_constgraph.kept import Stats, clear, refresh, stats
from hopkit_constgraph.op import (
    hopkit_add_ops,
    hopkit_samples_from_program,
    run_const_graph,
    run_const_graph_derive,
    run_const_graph_once,
)
from hopkit_constgraph.policy import Policy
from hopkit_constgraph.report import FoldReport
from hopkit_constgraph.samples import constant_part, sample_from_program

__all__ = [
    "FoldReport",
    "Policy",
    "Stats",
    "clear",
    "constant_part",
    "fold",
    "hopkit_add_commands",
    "hopkit_add_ops",
    "hopkit_samples_from_program",
    "module_of",
    "refresh",
    "report_of",
    "run_const_graph",
    "run_const_graph_derive",
    "run_const_graph_once",
    "sample_from_program",
    "stats",
]
