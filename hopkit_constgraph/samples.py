"""Samples from real models: what a model computes from its weights alone, and would compute once if it were folded.

torch.export loads torch's compiler, so nothing here runs before somebody asks for a sample.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Container, Iterable, Mapping

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.utils.parametrizations import weight_norm

import hopkit
from hopkit.extend import load_program
from hopkit_constgraph import constants

SPLIT = ("aten._weight_norm.default", "aten._weight_norm_interface.default")
"""Operators of torch, as a graph prints them, that are taken apart: they can be neither batched nor differentiated
forward, their parts can."""


class LowRank(torch.nn.Module):
    """A linear layer with a low-rank update (LoRA), merged where it is used."""

    def __init__(self, size: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = torch.nn.Linear(size, size)
        self.down = torch.nn.Linear(size, rank, bias=False)
        self.up = torch.nn.Linear(rank, size, bias=False)
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer with the update added to its weight."""
        weight = self.base.weight + self.scale * (self.up.weight @ self.down.weight)
        return torch.nn.functional.linear(x, weight, self.base.bias)


class Normalised(torch.nn.Module):
    """A convolution into whose weights the statistics of a batch norm are folded."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, features, kernel_size=3)
        self.norm = torch.nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution, with the norm's scale and shift in its weights."""
        conv, norm = self.conv, self.norm
        assert conv.bias is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = conv.weight * scale.reshape(-1, 1, 1, 1)
        bias = (conv.bias - norm.running_mean) * scale + norm.bias
        return torch.nn.functional.conv2d(x, weight, bias)


def samples() -> Iterable[hopkit.Sample]:
    """The weight-only parts of three models, the same in every process."""
    layer = torch.nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True)
    for linear in (layer.self_attn.out_proj, layer.linear1, layer.linear2):
        weight_norm(linear)
    models: Mapping[str, tuple[torch.nn.Module, torch.Tensor]] = {
        "weight-normalised transformer encoder layer": (layer, torch.zeros(2, 4, 8)),
        "batch norm folded into a convolution": (Normalised(3, 4), torch.zeros(1, 3, 8, 8)),
        "LoRA merge": (LowRank(8, rank=2, alpha=4.0), torch.zeros(2, 8)),
    }
    for name, (model, example) in models.items():
        yield constant_part(torch.export.export(settle(model), (example,)), name)


def settle(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with weights and statistics that do not depend on the process's random state."""
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


def sample_from_program(path: str | os.PathLike[str]) -> hopkit.Sample:
    """The constant part of an exported program in a file.

    Args:
        path: What ``torch.export.save`` wrote, usually ``*.pt2``.

    Returns:
        See `constant_part`.

    Raises:
        HopkitError: Nothing in the program depends on its weights alone.
        FileNotFoundError, ValueError: There is no such program; see `hopkit.extend.load_program`.
    """
    return constant_part(load_program(path), os.path.basename(path))


def constant_part(program: ExportedProgram, name: str = "program") -> hopkit.Sample:
    """All that ``program`` computes from parameters, buffers and constants alone, as a call of `run_const_graph`.

    What draws random numbers, what is no operator of torch, and what starts from a buffer that the program updates is
    no part of it.

    Args:
        program: An exported program.
        name: What the sample is called.

    Returns:
        A graph of the weights that gives every value which the rest of the program uses, and the weights.

    Raises:
        HopkitError: There is no such part.
    """
    split = {op: rule for op, rule in torch.export.default_decompositions().items() if str(op) in SPLIT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own: it copies a tree whose class it has deprecated
        # A table, though nearly empty, is what makes the program functional: a value is the same wherever it is used.
        program = program.run_decompositions(split)
    names, changed = constants.weights_of(program, program.graph)
    tensors = {**program.state_dict, **program.constants}
    found = constants.find(program.graph, {node: tensors[name] for node, name in names.items()}, changed)
    results = [n for n in program.graph.nodes if n in found.computed and _is_used(n, found.computed)]
    if not results:
        raise hopkit.HopkitError(
            f"exported program '{name}'",
            "has no constant part",
            why="nothing in it is computed from parameters, buffers and constants alone",
            todo="Export a model that computes a weight from others: a weight norm, a LoRA merge, a folded norm",
        )
    graph, weights = constants.graph_of(results, found)
    return hopkit.Sample((graph, tuple(found.sources[node].detach() for node in weights)), name=name)


def _is_used(node: Node, computed: Container[Node]) -> bool:
    """Whether this is a tensor that the rest of the program uses."""
    return isinstance(node.meta["val"], torch.Tensor) and not all(user in computed for user in node.users)
