"""What a run reports of each source: its losses, how much of it was consumed, and what the plan makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_haplovl.data.loader import BatchLoader
from megatron_haplovl.data.plan.cache import SourceShare
from megatron_haplovl.data.source_counts import SOURCE_COUNT_NAMES, IntArray
from megatron_haplovl.data.tile_rule import NarrowedSource
from megatron_haplovl.engine.steps import Sums
from megatron_haplovl.losses.by_source import by_source
from megatron_haplovl.losses.terms import BY_SOURCE, LossTerm
from megatron_haplovl.parallel.groups import Group

_SAMPLES = SOURCE_COUNT_NAMES.index("samples")


class SourceLosses:
    """Losses of each source over some steps: sums over all their tokens, divided by the number of these tokens.

    Nothing is computed and no message is sent where there is one source only.

    Args:
        names: of the sources.
        terms: the losses.
        device: where the sums are.
    """

    def __init__(self, names: Sequence[str], terms: Sequence[LossTerm], device: torch.device) -> None:
        self._names = names
        self._terms = [term for term in terms if term.name in BY_SOURCE]
        # A window may hold more tokens than fp32 counts.
        self._sums = torch.zeros(len(self._terms), len(names), dtype=torch.float64, device=device)
        self._counts: IntArray | int = 0

    def add(self, sums: Sums, counts: IntArray) -> None:
        """Add a step.

        Args:
            sums: this rank's; on a rank that computes no losses, there are none by source.
            counts: of the whole global batch, see :func:`data.source_counts.counts_by_source`.
        """
        for row, term in zip(self._sums, self._terms, strict=True):
            if by_source(term.name) in sums:
                row += sums[by_source(term.name)]
        self._counts = self._counts + counts

    def columns(self, group: Group) -> dict[str, float]:
        """`NAME OF THE LOSS/SOURCE` -> mean over the source's tokens; sources without such tokens are left out.

        Called by every rank.

        Args:
            group: the ranks whose sums add up to those of the global batch.
        """
        if len(self._names) == 1:
            return {}
        found: dict[str, float] = {}
        for term, row in zip(self._terms, group.sum(self._sums.clone()).tolist(), strict=True):
            column = SOURCE_COUNT_NAMES.index(term.count)
            for number, (name, total) in enumerate(zip(self._names, row, strict=True)):
                tokens = 0 if isinstance(self._counts, int) else int(self._counts[number, column])
                if tokens:
                    found[f"{term.name}/{name}"] = total / tokens
        return found

    def clear(self) -> None:
        """Begin anew."""
        self._sums.zero_()
        self._counts = 0


def consumed_columns(names: Sequence[str], counts: IntArray) -> dict[str, int]:
    """`consumed samples/SOURCE` -> samples; nothing where there is one source only."""
    if len(names) == 1:
        return {}
    return {f"consumed samples/{name}": int(row[_SAMPLES]) for name, row in zip(names, counts, strict=True)}


def describe_sources(shares: Sequence[SourceShare], data: BatchLoader, steps: int) -> str:
    """A table of the sources: samples, share of what a run of so many steps reads, and how often each is read.

    Args:
        shares: the sources, main ones first, then auxiliary ones.
        data: their batches.
        steps: of the run.
    """
    drawn_N = data.counts_by_source(range(steps))[:, _SAMPLES]
    lines = [f"sources of {int(drawn_N.sum())} samples in {steps} steps:"]
    for name, share, drawn in zip(data.source_names, shares, drawn_N.tolist(), strict=True):
        known = share.source.num_samples
        size = known if share.samples is None else len(share.samples)
        rule = ""
        if isinstance(share.source, NarrowedSource):
            rule = f", {share.source.rule.words()}: fewer tiles than an export makes of such images"
        lines.append(
            f"  {name}: {size} samples{'' if size == known else f' of {known}'}, {100 * drawn / drawn_N.sum():.2f} % "
            f"of those read, {drawn / size:.2f} epochs{rule}"
        )
    return "\n".join(lines)
