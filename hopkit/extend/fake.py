"""fake: a rule has the body's own signature. The fake mode is active while it runs."""

from __future__ import annotations

from typing import Protocol, TypeVar

from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class FakeRule(Protocol[P, R]):
    """Gives outputs of the right shapes, strides, dtypes and devices, on fake tensors."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
