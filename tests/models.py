"""Real models for tests and benchmarks, from torch.nn alone: a GPT-style transformer and a residual network.

Every model has a plain form, in which nothing of hopkit is called, and forms with the same parameters in which the
inside of each block is called through an op. What is compared is then the op alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import hopkit
from hopkit import Subgraph

Through: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""How a block is called: itself, or through an op."""


class Attention(nn.Module):
    """Causal self-attention, after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast("Tensor", self.out(mixed.transpose(1, 2).reshape(batch, length, width)))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, after a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.out(nn.functional.gelu(self.wide(self.norm(x)))))


class Transformer(nn.Module):
    """A block of GPT-2: attention and MLP, each added to what it takes."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return cast("Tensor", x + self.mlp(x))


class Residual(nn.Module):
    """The basic block of ResNet: two convolutions with batch norm, added to what it takes."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels, track_running_stats=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + x)


class Gpt(nn.Module):
    """Tokens to scores of the next one, through several blocks.

    Args:
        layers: How many blocks.
        through: How each is called.
    """

    def __init__(self, layers: int, through: Through, *, width: int = 64, heads: int = 4, tokens: int = 64) -> None:
        super().__init__()
        self.through = through
        self.tokens = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Transformer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = self.through(block, x)
        return cast("Tensor", self.scores(self.norm(x)))


class ResNet(nn.Module):
    """Images to scores of classes, through several blocks.

    Args:
        layers: How many blocks.
        through: How each is called.
    """

    def __init__(self, layers: int, through: Through, *, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.through = through
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(channels) for _ in range(layers))
        self.scores = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for block in self.blocks:
            x = self.through(block, x)
        return cast("Tensor", self.scores(x.mean((2, 3))))


def inline(block: nn.Module, x: Tensor) -> Tensor:
    """The plain form."""
    return cast("Tensor", block(x))


def single(*, outline: bool = False) -> Through:
    """An op whose one subgraph is the block."""

    @hopkit.define("model_block", outline=outline, replace=True)
    def run(body: Subgraph, x: Tensor) -> Tensor:
        return body(x)

    def through(block: nn.Module, x: Tensor) -> Tensor:
        return run(block, x)

    return through


def composite(*, outline: bool = False) -> Through:
    """An op that calls the attention and the MLP of a transformer block, and adds."""

    @hopkit.define("model_two", outline=outline, replace=True)
    def run(first: Subgraph, second: Subgraph, x: Tensor) -> Tensor:
        x = x + first(x)
        return x + second(x)

    def through(block: Transformer, x: Tensor) -> Tensor:
        return run(block.attention, block.mlp, x)

    return cast("Through", through)
