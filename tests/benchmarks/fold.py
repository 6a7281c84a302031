"""Folded models beside the models as they are, folded by hand, and with torch's own op; ratios in one run.

python -m tests.benchmarks.fold
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm

from hopkit_constgraph import fold
from hopkit_constgraph.kept import Memory

ROUNDS, CALLS = 15, 20


class Adapted(nn.Module):
    """Linear layers with low-rank updates."""

    def __init__(self, size: int = 512, rank: int = 8, layers: int = 8) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(size, size) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(size, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, size, bias=False) for _ in range(layers))

    def layers(self) -> Iterable[tuple[Any, Any, Any]]:
        """A layer, and the two parts of its update."""
        return zip(self.base, self.down, self.up, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        """The layers, one after the other."""
        for base, down, up in self.layers():
            x = nn.functional.linear(x, base.weight + up.weight @ down.weight, base.bias).relu()
        return x


def merged(model: Adapted) -> nn.Module:
    """By hand: plain linear layers."""
    layers: list[nn.Module] = []
    for base, down, up in model.layers():
        layer = nn.Linear(*base.weight.shape[::-1])
        layer.weight.copy_(base.weight + up.weight @ down.weight)
        layer.bias.copy_(base.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def convolved(layers: int = 6, channels: int = 32) -> nn.Sequential:
    """Convolutions with batch norms."""
    made: list[nn.Module] = []
    for number in range(layers):
        made += [nn.Conv2d(channels if number else 3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*made).eval()


def fused(model: nn.Sequential) -> nn.Sequential:
    """By hand: torch's own fusion."""
    parts: list[Any] = list(model)
    made: list[nn.Module] = []
    for conv, norm, act in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        made += [fuse_conv_bn_eval(conv, norm), act]
    return nn.Sequential(*made)


def normalised(size: int = 512, layers: int = 6) -> nn.Sequential:
    """Linear layers with weight norms."""
    made: list[nn.Module] = []
    for _ in range(layers):
        made += [weight_norm(nn.Linear(size, size)), nn.ReLU()]
    return nn.Sequential(*made)


def plain(model: nn.Sequential) -> nn.Sequential:
    """By hand: the weights as they come out of their norms."""
    made: list[nn.Module] = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            made.append(nn.Linear(layer.in_features, layer.out_features))
            made[-1].load_state_dict({"weight": layer.weight, "bias": layer.bias})
        else:
            made.append(layer)
    return nn.Sequential(*made)


def seconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least time of a call, each measured in turn."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            least[name] = min(least[name], (time.perf_counter() - start) / CALLS)
    return least


def ways(model: nn.Module, by_hand: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The ways to run a model."""
    found: dict[str, Any] = {"by hand": by_hand, "model": model, "folded": fold(model, (x,))}
    for name in tuple(found):
        found[f"{name}, compiled"] = torch.compile(found[name])
    return {name: functools.partial(run, x) for name, run in found.items()}


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    adapted, convolutions, norms = Adapted(), convolved(), normalised()
    models = {
        "low-rank updates": (adapted, merged(adapted), torch.randn(16, 512)),
        "convolutions and batch norms": (convolutions, fused(convolutions), torch.randn(1, 3, 32, 32)),
        "weight norms": (norms, plain(norms), torch.randn(16, 512)),
    }
    print("time of a call, against the model that is folded by hand")
    for title, (model, by_hand, x) in models.items():
        runs = ways(model, by_hand, x)
        for run in runs.values():
            torch.testing.assert_close(run(), by_hand(x), rtol=1e-3, atol=1e-4)
        found = seconds(runs)
        print(f"\n{title}")
        for name, value in found.items():
            base = found["by hand, compiled" if "compiled" in name else "by hand"]
            print(f"  {name:<20} {value * 1e6:9.1f} us  {value / base:6.3f}")
    weights = tuple(nn.Parameter(torch.zeros(4, 4)) for _ in range(1000))
    memory = Memory()
    checked = seconds({"check": lambda: memory.results(lambda *args: (args[0] + 1,), weights)})
    print(f"\n1000 weights that have not changed: {checked['check'] * 1e6:.1f} us")


if __name__ == "__main__":
    main()
