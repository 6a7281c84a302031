"""An example plugin of hopkit: an op, a rule for somebody else's op, and a mode. The README goes through it."""

from hopkit_example.mode import LogOps, hopkit_add_modes, hopkit_log_ops_rule
from hopkit_example.op import hopkit_add_ops, repeat
from hopkit_example.rule import hopkit_fake_rule

__all__ = ["LogOps", "hopkit_add_modes", "hopkit_add_ops", "hopkit_fake_rule", "hopkit_log_ops_rule", "repeat"]
