"""Control flow and regions as ops of hopkit. One file per op; the README goes through them."""

from collections.abc import Iterable

import hopkit
from hopkit.extend import hookimpl
from hopkit_controlflow.associative_scan import associative_scan
from hopkit_controlflow.checkpoint import checkpoint
from hopkit_controlflow.cond import cond
from hopkit_controlflow.custom_vjp import custom_vjp
from hopkit_controlflow.fixed_point import fixed_point
from hopkit_controlflow.fori_loop import fori_loop
from hopkit_controlflow.linear_solve import linear_solve
from hopkit_controlflow.map import map
from hopkit_controlflow.region import region
from hopkit_controlflow.scan import scan
from hopkit_controlflow.switch import switch
from hopkit_controlflow.while_loop import while_loop

OPS: tuple[hopkit.Op[..., object], ...] = (associative_scan, cond, fori_loop, map, scan, switch, while_loop, region)
OPS += (checkpoint, custom_vjp, fixed_point, linear_solve)


@hookimpl
def hopkit_add_ops() -> Iterable[hopkit.Op[..., object]]:
    """Makes the ops known as this plugin's."""
    return OPS


__all__ = [
    "associative_scan",
    "checkpoint",
    "cond",
    "custom_vjp",
    "fixed_point",
    "fori_loop",
    "hopkit_add_ops",
    "linear_solve",
    "map",
    "region",
    "scan",
    "switch",
    "while_loop",
]
