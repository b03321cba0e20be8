"""Runs of `worker_parallel.py`, each started when its result is first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import PARALLEL_RANKS, parallel_case
from tests.distributed.launch import run_ranks


@dataclass(frozen=True)
class ParallelRuns:
    """Results in a folder."""

    folder: Path
    ranks: int = PARALLEL_RANKS
    adamw: str = "torch"
    """--adamw-implementation."""

    def result(self, recipe: str, layout: str) -> dict[str, Any]:
        """What the run has left behind."""
        case = parallel_case(recipe, layout)
        path = self.folder / f"{case}.pt"
        if not path.is_file():
            run_ranks("worker_parallel.py", self.ranks, str(self.folder), self.adamw, case)
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found
