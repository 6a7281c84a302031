"""The constant part of a program: what is in it, what is not, and that it computes what the program computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.export import ExportedProgram
from torch.nn.utils.parametrizations import weight_norm

import hopkit
from hopkit.testing import check
from hopkit_constgraph import constant_part, hopkit_samples_from_program, run_const_graph, sample_from_program
from hopkit_constgraph.samples import samples


def export(model: torch.nn.Module, *inputs: torch.Tensor) -> ExportedProgram:
    return torch.export.export(model, inputs)


def compute(sample: hopkit.Sample) -> tuple[torch.Tensor, ...]:
    return cast("tuple[torch.Tensor, ...]", cast("Callable[..., object]", run_const_graph)(*sample.args))


class Normed(torch.nn.Module):
    """A weight norm by hand, whose norm is used by the model as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(1.0, 2.0, 6).reshape(2, 3))
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.vector_norm(self.weight)
        return torch.nn.functional.linear(x, self.weight / norm) + norm


def test_it_is_maximal_and_gives_what_the_rest_uses() -> None:
    model = Normed()
    sample = constant_part(export(model, torch.zeros(4, 3)))
    assert [w.shape for w in cast("tuple[torch.Tensor, ...]", sample.args[1])] == [(2, 3)]
    norm = model.weight.detach().norm()
    torch.testing.assert_close(compute(sample), (norm, model.weight.detach() / norm))


def test_weights_are_detached() -> None:
    sample = constant_part(export(Normed(), torch.zeros(4, 3)))
    assert not any(w.requires_grad for w in cast("tuple[torch.Tensor, ...]", sample.args[1]))


def test_random_numbers_are_no_part_of_it() -> None:
    class Noisy(Normed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.weight.exp() + torch.rand_like(self.weight)).sum()

    model = Noisy()
    torch.testing.assert_close(compute(constant_part(export(model, torch.zeros(1)))), (model.weight.detach().exp(),))


def test_a_buffer_that_the_program_updates_is_no_part_of_it() -> None:
    class Counting(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.count = torch.nn.Buffer(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x * self.count.exp() * self.weight.exp().sum()

    model = Counting()
    sample = constant_part(export(model, torch.zeros(1)))
    torch.testing.assert_close(compute(sample), (model.weight.detach().exp().sum(),))


def test_writes_along_the_way_are_undone() -> None:
    class InPlace(Normed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scratch = self.weight.exp()
            before = scratch.sum()
            scratch.add_(1)
            return x * before * scratch.sum()

    model = InPlace()
    exp = model.weight.detach().exp()
    torch.testing.assert_close(compute(constant_part(export(model, torch.zeros(1)))), (exp.sum(), (exp + 1).sum()))


def test_a_program_without_a_constant_part_is_an_error() -> None:
    with pytest.raises(hopkit.HopkitError, match="exported program 'plain' has no constant part"):
        constant_part(export(torch.nn.Linear(3, 3), torch.zeros(1, 3)), "plain")


def test_a_program_in_a_file(tmp_path: Path) -> None:
    model = weight_norm(torch.nn.Linear(3, 2))
    torch.export.save(export(model, torch.zeros(1, 3)), tmp_path / "model.pt2")
    sample = sample_from_program(tmp_path / "model.pt2")
    assert sample.name == "model.pt2"
    torch.testing.assert_close(compute(sample), (model.weight.detach(),))
    assert check(run_const_graph, [sample], modes=["device", "proxy", "functionalize"]).ok


def test_the_plugin_finds_samples_for_its_own_ops_alone() -> None:
    program = export(weight_norm(torch.nn.Linear(3, 2)), torch.zeros(1, 3))
    other = dataclasses.replace(run_const_graph.spec, name="other")
    assert len(list(hopkit_samples_from_program(run_const_graph.spec, program) or ())) == 1
    assert hopkit_samples_from_program(other, program) is None


def test_the_samples_are_the_same_every_time() -> None:
    first, again = (list(samples()) for _ in range(2))
    assert len(first) == 3
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one.args[1], other.args[1], rtol=0, atol=0)


def test_the_samples_are_what_the_models_compute() -> None:
    sample = next(s for s in samples() if s.name == "LoRA merge")
    base, down, up = cast("tuple[torch.Tensor, ...]", sample.args[1])
    torch.testing.assert_close(compute(sample), (base + 2.0 * (up @ down),))
