"""From sums over tokens to the numbers that are trained on and logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_haplovl.data.batch import StepCounts
from megatron_haplovl.losses.terms import LossTerm
from megatron_haplovl.parallel.groups import Group


def total_loss(sums: Mapping[str, torch.Tensor], terms: Sequence[LossTerm], counts: StepCounts) -> torch.Tensor:
    """This micro-batch's share of the step's loss: each trained sum over its global count, weighted and added up."""
    shares = [term.weight * _divide(sums[term.name], term, counts) for term in terms if term.weight is not None]
    return torch.stack(shares).sum()


def reduce_metrics(
    sums: Mapping[str, torch.Tensor], terms: Sequence[LossTerm], counts: StepCounts, group: Group
) -> dict[str, float]:
    """Losses of a whole step, equal on every rank.

    Args:
        sums: this rank's sums over its micro-batches.
        terms: what they are divided by.
        counts: tokens of the whole global batch.
        group: the ranks whose sums add up to those of the global batch, `ParallelGroups.stages_of_replicas`.
    """
    local = torch.stack([sums[term.name].detach().float() for term in terms])
    values = group.sum(local)
    return {term.name: float(_divide(value, term, counts)) for term, value in zip(terms, values, strict=True)}


def _divide(value: torch.Tensor, term: LossTerm, counts: StepCounts) -> torch.Tensor:
    # A batch with no such token has a sum of zero, and so a loss of zero.
    return value / max(1, getattr(counts, term.count))
