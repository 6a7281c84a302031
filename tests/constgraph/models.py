"""Models that compute something from their weights alone, for the tests of `fold`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Merged(nn.Module):
    """A linear layer with a low-rank update that is merged at every call."""

    def __init__(self, size: int = 8, rank: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(size, size)
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer, with its update."""
        return nn.functional.linear(x, self.base.weight + self.up.weight @ self.down.weight, self.base.bias)


class Quantised(nn.Module):
    """A linear layer whose weight is kept as bytes."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("packed", torch.randint(-128, 127, (size, size), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(size, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        return nn.functional.linear(x, self.get_buffer("packed").to(torch.float32) * self.scale)


class Convolved(nn.Module):
    """Convolutions with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        for name, value in self.named_buffers():
            if "running" in name:
                value.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        """The features."""
        features: Tensor = self.layers(x)
        return features


X = torch.linspace(-1.0, 1.0, 16).reshape(2, 8)
IMAGE = torch.linspace(-1.0, 1.0, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
