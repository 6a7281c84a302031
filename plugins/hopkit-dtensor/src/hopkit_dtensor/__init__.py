"""Ops on DTensors: placements flow through a body, or follow a sharding rule. The README goes through it."""

from hopkit_dtensor.local import Placements
from hopkit_dtensor.mode import hopkit_add_modes
from hopkit_dtensor.sharding import ShardingRule, sharding

__all__ = ["Placements", "ShardingRule", "hopkit_add_modes", "sharding"]
