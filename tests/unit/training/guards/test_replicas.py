"""Which of several ranks has the wrong weights: ranks are threads here, and have plain models."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_haplovl.parallel.groups import Group, ParallelGroups
from megatron_haplovl.training.guards.replicas import Disagreement, Replicas


class _Meeting:
    """What all threads bring along, for each of them."""

    def __init__(self, size: int) -> None:
        self._barrier, self._brought = threading.Barrier(size, timeout=20), dict[int, Any]()

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self._brought[rank] = mine
        self._barrier.wait()
        found = [self._brought[other] for other in sorted(self._brought)]
        self._barrier.wait()
        return found


def compare(models: list[nn.Module], *, tensor: int = 1) -> Disagreement | None:
    """The answer of ranks that each have one model, tensor-parallel ranks fastest."""
    size = len(models)
    meeting, answers = _Meeting(size), dict[int, Disagreement | None]()

    def run(rank: int) -> None:
        control: Any = SimpleNamespace(gather_objects=lambda mine: meeting.exchange(rank, mine))
        groups = ParallelGroups(
            world=Group(rank, size),
            control=control,
            tensor=Group(rank % tensor, tensor),
            replicas=Group(rank // tensor, size // tensor),
        )
        engine: Any = SimpleNamespace(zero_optimization_stage=lambda: 0)
        model: Any = SimpleNamespace(module=models[rank], groups=groups)
        answers[rank] = Replicas(engine, model).compare()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == size and len(set(answers.values())) == 1, "every rank says the same"
    return answers[0]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"connector": nn.Linear(3, 3, bias=False), "final_norm": nn.LayerNorm(3)})


def flip(module: nn.Module, name: str) -> None:
    dict(module.named_parameters())[name].data.view(-1).view(torch.int32)[0] ^= 1


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("name", ["connector.weight", "final_norm.bias"])
def test_of_three_replicas_the_odd_one_is_wrong(wrong: int, name: str) -> None:
    models = [model() for _ in range(3)]
    assert compare(models) is None
    flip(models[wrong], name)
    found = compare(models)
    assert found == Disagreement(name, (wrong,), is_known=True, parameters=1)
    assert found.words.startswith(f"{name} on rank {wrong} differs from the other ranks' copy; that points to")


def test_of_two_replicas_both_are_named() -> None:
    models = [model() for _ in range(2)]
    flip(models[0], "connector.weight")
    flip(models[0], "final_norm.bias")
    found = compare(models)
    assert found == Disagreement("connector.weight", (0, 1), is_known=False, parameters=2)
    assert found.words == (
        "connector.weight (and 1 more) differs between the ranks 0, 1, and nothing says which of them is right"
    )


@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_a_whole_parameter_has_the_votes_of_tensor_parallel_ranks_too(wrong: int) -> None:
    models = [model() for _ in range(4)]
    for rank in (1, 3):
        # Their part of a split parameter is another one.
        flip(models[rank], "connector.weight")
    assert compare(models, tensor=2) is None
    flip(models[wrong], "final_norm.weight")
    assert compare(models, tensor=2) == Disagreement("final_norm.weight", (wrong,), is_known=True, parameters=1)
    flip(models[wrong], "final_norm.weight")
    flip(models[wrong], "connector.weight")
    peers = tuple(rank for rank in range(4) if rank % 2 == wrong % 2)
    assert compare(models, tensor=2) == Disagreement("connector.weight", peers, is_known=False, parameters=1)
