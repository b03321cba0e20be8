"""What the log says of all ranks: one small message for each line, over the host's group."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

from megatron_haplovl.operation.phase import EnterPhase
from megatron_haplovl.parallel.groups import Group, ParallelGroups


@dataclass(frozen=True)
class RankFigures:
    """One rank's part of a log line."""

    waited: float
    """Seconds for batches."""
    own: float
    """Seconds in which it waited for no other rank: those for batches, and forward passes without messages."""
    peak_bytes: float
    positions: float
    """Of the micro-batches that it read, padding included."""


def gather_figures(mine: RankFigures, control: Group) -> list[RankFigures]:
    """Every rank's figures, by rank. Called by every rank; one sum of a few numbers."""
    table = torch.zeros(control.size, len(fields(RankFigures)), dtype=torch.float64)
    table[control.rank] = torch.tensor(astuple(mine), dtype=torch.float64)
    return [RankFigures(*row) for row in control.sum(table).tolist()]


def readers(figures: Sequence[RankFigures], groups: ParallelGroups) -> Sequence[RankFigures]:
    """Those of one rank for each part of the data: the first stage's, one of those that share a sequence."""
    sharing = groups.context.size * groups.tensor.size
    return figures[: groups.data.size * sharing : sharing]


def rank_columns(figures: Sequence[RankFigures], steps: int) -> dict[str, float | int]:
    """Columns of the slowest and the fastest rank, by their own seconds in each step; none of a single rank."""
    if len(figures) == 1:
        return {}
    own = [figure.own for figure in figures]
    return {
        "slowest rank": own.index(max(own)),
        "slowest rank (ms)": 1000.0 * max(own) / steps,
        "fastest rank": own.index(min(own)),
        "fastest rank (ms)": 1000.0 * min(own) / steps,
    }


def forward_is_alone(groups: ParallelGroups, zero_stage: int) -> bool:
    """Whether a forward pass has no message in which one rank waits for another."""
    return groups.tensor.size == groups.context.size == groups.pipeline.size == 1 and zero_stage < 3


class ForwardTime:
    """Seconds of this rank's forward passes in training, by the device's own clock.

    Args:
        enter: is told of every phase, too.
        device: where the passes run.
    """

    def __init__(self, enter: EnterPhase, device: torch.device) -> None:
        self._enter, self._device = enter, device
        self._clock: Any = torch.cuda.Event if device.type == "cuda" else _HostEvent
        self._begun: Any = None
        self._passes: list[tuple[Any, Any]] = []

    def enter(self, phase: str) -> None:
        """A phase begins. Only what lies between `forward` and the `backward` that follows it is a forward pass."""
        self._enter(phase)
        if phase == "forward":
            self._begun = self._now()
        elif phase == "backward" and self._begun is not None:
            self._passes.append((self._begun, self._now()))
            self._begun = None

    def take(self) -> float:
        """The seconds since the last call."""
        passes, self._passes = self._passes, []
        if passes:
            passes[-1][1].synchronize()
        return float(sum(begun.elapsed_time(ended) for begun, ended in passes)) / 1000.0

    def _now(self) -> Any:
        event = self._clock(enable_timing=True)
        event.record()
        return event


class _HostEvent:
    """`torch.cuda.Event`, where the device is the host."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, other: _HostEvent) -> float:
        """Milliseconds."""
        return 1000.0 * (other._at - self._at)
