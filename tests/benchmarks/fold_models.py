"""Real models that compute from their weights at every call, and the same folded by hand. Random weights, one input.

torchvision and transformers are the extra ``benchmarks``; where one is missing, its models are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from hopkit_constgraph import Policy


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model, the same folded by hand, and an input."""

    title: str
    model: nn.Module
    by_hand: nn.Module
    example: Tensor
    policy: Policy = dataclasses.field(default_factory=Policy)


class LowRank(nn.Module):
    """A low-rank update (LoRA) of a weight, as a parametrization."""

    def __init__(self, weight: Tensor, rank: int = 8) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / rank)
        self.up = nn.Parameter(torch.randn(weight.shape[0], rank) * 1e-3)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its update."""
        return weight + self.up @ self.down


class Logits(nn.Module):
    """A language model that gives one tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


class Packed(nn.Module):
    """A linear layer whose weight is kept as bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(-128, 127, (size, size), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(size, 1) / 128 / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        return nn.functional.linear(x, self.get_buffer("packed").to(torch.float32) * self.scale)

    def by_hand(self) -> nn.Linear:
        """The layer, with its weight in full."""
        size = self.scale.shape[0]
        made = nn.Linear(size, size, bias=False)
        made.weight.data.copy_(self.get_buffer("packed") * self.scale)
        return made


def adapted(model: nn.Module, wanted: tuple[str, ...]) -> nn.Module:
    """A model with low-rank updates of the weights of some of its layers."""
    for name, layer in list(model.named_modules()):
        if name.endswith(wanted):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    return model


def settled(model: nn.Module) -> nn.Module:
    """By hand: every weight as its parametrization gives it, in place."""
    for layer in list(model.modules()):
        for name in list(getattr(layer, "parametrizations", ())):
            parametrize.remove_parametrizations(layer, name)
    return model


def twice(make: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """The same model, two times. A copy would share classes, from which torch takes parametrizations away."""
    for _ in range(2):
        torch.manual_seed(0)
        yield make().eval()


def normed(norm: Callable[..., nn.Module], width: int = 64) -> nn.Sequential:
    """Convolutions with weight norms or spectral norms."""
    sizes = [3, *[width] * 6]
    layers = [norm(nn.Conv2d(a, b, 3, padding=1)) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.LeakyReLU()))).eval()


def language(kind: Callable[[object], nn.Module], config: object, wanted: tuple[str, ...]) -> nn.Module:
    """A language model with low-rank updates."""
    return adapted(Logits(kind(config)), wanted)


def candidates() -> Iterator[Candidate]:
    """All models for which there are packages."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, 224, 224)
    if vision := _optional("torchvision.models"):
        for name in ("resnet18", "mobilenet_v3_small"):
            model = getattr(vision, name)(weights=None).eval()
            yield Candidate(name, model, fuse(model), image)
    norms: dict[str, Callable[..., nn.Module]] = {"weight norms": weight_norm, "spectral norms": spectral_norm}
    for title, norm in norms.items():
        model, hand = twice(functools.partial(normed, norm))
        yield Candidate(title, model, settled(hand), torch.randn(1, 3, 48, 48))
    tokens = torch.arange(64).reshape(1, 64)
    if hub := _optional("transformers"):
        sizes = {"vocab_size": 1000, "attn_implementation": "sdpa"}
        gpt = hub.GPT2Config(n_layer=6, n_head=6, n_embd=384, n_positions=64, **sizes)
        llama = hub.LlamaConfig(
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            hidden_size=384,
            intermediate_size=1024,
            max_position_embeddings=64,
            **sizes,
        )
        made = {
            "GPT-2 with low-rank updates": (hub.GPT2LMHeadModel, gpt, ("attn.c_attn", "attn.c_proj")),
            "Llama with low-rank updates": (hub.LlamaForCausalLM, llama, ("q_proj", "v_proj")),
        }
        for title, (kind, config, wanted) in made.items():
            model, hand = twice(functools.partial(language, kind, config, wanted))
            yield Candidate(title, model, settled(hand), tokens)
    layers = [Packed(1024) for _ in range(4)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    hand = nn.Sequential(*(part for layer in layers for part in (layer.by_hand(), nn.ReLU())))
    yield Candidate("packed bytes", model, hand, torch.randn(64, 1024), Policy(growth=4.0))


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):  # torchvision for another torch
        return None
