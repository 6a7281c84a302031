"""Draw the plot of docs/tutorials/fold-a-model.md, of the model on that page.

python -m tests.benchmarks.fold_plot
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hopkit_constgraph import Policy, fold, stats
from tests.benchmarks.fold import seconds
from tests.benchmarks.fold_models import adapted, settled, twice

TARGET = Path(__file__).parents[2] / "docs" / "tutorials" / "fold-a-model.svg"
WIDTH, BAR, LEFT = 560, 22, 150


def model(layers: int = 4, size: int = 256) -> nn.Module:
    """The model."""
    layer = nn.TransformerEncoderLayer(size, nhead=4, dim_feedforward=4 * size, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    return adapted(encoder, ("linear1", "linear2"))


def mebibytes(module: nn.Module) -> float:
    """What a module's weights take, and what it keeps."""
    weights = {id(t): t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())}
    return (sum(weights.values()) + stats(module).bytes) / (1 << 20)


def bars(title: str, unit: str, values: Mapping[str, float], top: int) -> list[str]:
    """One group of bars."""
    most = max(values.values())
    drawn = [f'<text x="0" y="{top}" font-weight="bold">{title}</text>']
    for number, (name, value) in enumerate(values.items()):
        y, length = top + 12 + number * (BAR + 6), (WIDTH - LEFT - 90) * value / most
        colour = "#4878a8" if name.startswith(("folded", "released")) else "#b0b0b0"
        drawn += [
            f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{name}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{y + 16}">{value:.2f} {unit}</text>',
        ]
    return drawn


@torch.no_grad()
def main() -> None:
    """Measure, and write the file."""
    torch.set_num_threads(1)
    plain, hand = (each.train() for each in twice(model))  # as on the page; in evaluation torch has a kernel for it all
    settled(hand)
    x = torch.randn(1, 16, 256)
    folded = fold(plain, (x,))
    ways: dict[str, Any] = {"as it is": plain, "folded": folded, "by hand": hand}
    times = {name: 1e3 * t for name, t in seconds({n: functools.partial(m, x) for n, m in ways.items()}).items()}
    memory = {"as it is": mebibytes(plain), "folded": mebibytes(folded), "by hand": mebibytes(hand)}
    memory["released"] = mebibytes(fold(copy.deepcopy(plain), (x,), policy=Policy(release=True)))
    parts = [*bars("Time of a call", "ms", times, 16), *bars("Memory", "MiB", memory, 140)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="270" font-family="sans-serif" font-size="13">'
    )
    TARGET.write_text("\n".join([head, *parts, "</svg>", ""]), encoding="utf-8")
    print(times, memory)


if __name__ == "__main__":
    main()
