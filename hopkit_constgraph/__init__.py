"""The first plugin: `run_const_graph`, torch's own op of that name, made with hopkit and made to work everywhere."""

from hopkit_constgraph.op import hopkit_add_ops, hopkit_samples_from_program, run_const_graph, run_const_graph_derive
from hopkit_constgraph.samples import constant_part, sample_from_program

__all__ = [
    "constant_part",
    "hopkit_add_ops",
    "hopkit_samples_from_program",
    "run_const_graph",
    "run_const_graph_derive",
    "sample_from_program",
]
