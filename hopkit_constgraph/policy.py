"""What a fold may do: it never costs memory that nobody asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch.fx import Node

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is folded, and what is left in place.

    Args:
        growth: A constant may take this many times the bytes of the weights that it is computed from. Dequantised
            weights take four times theirs, and are left in place.
        small: Constants of up to this many bytes may grow as they like.
        most: All constants together may take this many bytes. None: as many as they take.
        release: Compute the constants when the model is folded, and let go of the weights that nothing else uses: in
            the folded model, and in the one that was given. Whoever touches one of these from then on gets an error.
        norms: Write batch norms in evaluation into the weights of the convolutions before them. Rounding differs a
            little from that of the model.
        skip: Says of a node of the graph that it is to stay as it is.
    """

    growth: float = 2.0
    small: int = MIB
    most: int | None = None
    release: bool = False
    norms: bool = True
    skip: Callable[[Node], bool] | None = None

    def __post_init__(self) -> None:
        for name in ("growth", "small", "most"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
                raise ValueError(f"Policy({name}={value!r}): expected a number that is not negative")
