"""Control flow and regions as ops of hopkit. One file per op; the README goes through them."""

from collections.abc import Iterable

import hopkit
from hopkit.extend import hookimpl
from hopkit_controlflow.custom_vjp import custom_vjp
from hopkit_controlflow.region import region

OPS: tuple[hopkit.Op[..., object], ...] = (custom_vjp, region)


@hookimpl
def hopkit_add_ops() -> Iterable[hopkit.Op[..., object]]:
    """Makes the ops known as this plugin's."""
    return OPS


__all__ = ["custom_vjp", "hopkit_add_ops", "region"]
