"""An example plugin of hopkit: an op, a rule for another op, a mode, a tensor class. The README explains it."""

from hopkit_example.matrix import hopkit_add_columns, hopkit_add_modes, hopkit_log_ops_rule, hopkit_made_rule
from hopkit_example.mode import LogOps, Made
from hopkit_example.op import hopkit_add_ops, repeat
from hopkit_example.rule import hopkit_fake_rule

__all__ = [
    "LogOps",
    "Made",
    "hopkit_add_columns",
    "hopkit_add_modes",
    "hopkit_add_ops",
    "hopkit_fake_rule",
    "hopkit_log_ops_rule",
    "hopkit_made_rule",
    "repeat",
]
