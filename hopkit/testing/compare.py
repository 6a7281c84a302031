"""Whether a mode gave what the body gives: structure, shapes, strides, dtypes, devices and values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from hopkit._torch import trees


@dataclasses.dataclass(frozen=True)
class Pair:
    """One thing that a mode gave, and what it should have given.

    Args:
        what: What the two are: "value", "gradient" ...
        got: A pytree of tensors and plain values.
        want: The same from the body, in plain eager PyTorch.
        values: Whether numbers are compared; stand-ins have none.
        strides: Whether strides are compared. torch promises none for gradients, nor under vmap.
    """

    what: str
    got: object
    want: object
    values: bool = True
    strides: bool = True


def difference(pair: Pair) -> tuple[float, str]:
    """The largest error, and the first thing that is different, or ""."""
    got, got_tree = trees.flatten(pair.got)
    want, want_tree = trees.flatten(pair.want)
    if got_tree != want_tree:
        return math.inf, f"{pair.what} is {_shown(pair.got)}, not {_shown(pair.want)}"
    largest = 0.0
    for number, (left, right) in enumerate(zip(got, want, strict=True)):
        error, told = _leaves(left, right, pair)
        largest = max(largest, error)
        if told:
            return largest, f"{pair.what}{f' {number}' if len(got) > 1 else ''} has {told}"
    return largest, ""


def _leaves(got: object, want: object, pair: Pair) -> tuple[float, str]:
    if not (isinstance(got, torch.Tensor) and isinstance(want, torch.Tensor)):
        same = type(got) is type(want) and (got == want or (got != got and want != want))
        return (0.0, "") if same else (math.inf, f"{_shown(got)}, not {_shown(want)}")
    for name, left, right in _facts(got, want, pair):
        if left != right:
            return math.inf, f"{name} {left}, not {right}"
    return _values(got.detach(), want.detach()) if pair.values else (0.0, "")


def _facts(got: torch.Tensor, want: torch.Tensor, pair: Pair) -> Iterator[tuple[str, object, object]]:
    if pair.values:
        yield "type", _kind(got), _kind(want)
    yield "layout", got.layout, want.layout
    yield "dtype", got.dtype, want.dtype
    yield "device", got.device, want.device
    if got.is_nested:
        return
    yield "shape", tuple(got.shape), tuple(want.shape)
    if pair.strides and want.layout is torch.strided:
        yield "strides", _strides(got), _strides(want)


def _kind(tensor: torch.Tensor) -> str:
    return "Tensor" if isinstance(tensor, torch.nn.Parameter) else type(tensor).__name__


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that say where elements are: those of sizes above one."""
    if tensor.numel() == 0:
        return ()
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _values(got: torch.Tensor, want: torch.Tensor) -> tuple[float, str]:
    if got.is_nested:
        parts = [_values(*pair) for pair in zip(got.unbind(), want.unbind(), strict=True)]
        return max(parts, default=(0.0, ""))
    if got.layout is not torch.strided:
        got, want = got.to_dense(), want.to_dense()
    if want.numel() == 0 or want.device.type == "meta":
        return 0.0, ""
    wide = torch.complex128 if want.is_complex() else torch.float64
    left, right = got.to("cpu", wide), want.to("cpu", wide)
    same = (left == right) | (left.isnan() & right.isnan())
    error = torch.where(same, 0.0, (left - right).abs()).nan_to_num(math.inf).max().item()
    try:
        torch.testing.assert_close(got, want, equal_nan=True)
    except AssertionError:
        return error, f"values that are wrong by {error:.3g}"
    return error, ""


def _shown(value: object) -> str:
    text = repr(trees.map_only(torch.Tensor, lambda t: f"Tensor{list(t.shape)}", value))
    return text if len(text) <= 80 else f"{text[:77]}..."
