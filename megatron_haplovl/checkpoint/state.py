"""Where a run stands: the position in the data, and which run it is. One small file of every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint.typed import Fields
from megatron_haplovl.config.files import read_json

STATE_FILE = "training_state.json"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run must know beside weights, moments and settings."""

    iteration: int
    """Optimizer steps done."""
    global_batch_size: int
    plan_key: str
    """The training data's `BatchLoader.plan_key`; with the iteration, the position in the data."""
    run_id: str | None = None
    """The run that wrote the checkpoint; None in checkpoints of earlier versions."""
    config_sha256: str | None = None
    """Of CONFIG_FILE beside it, which has no place for a run's id."""
    skipped_iterations: int = 0
    """Those of them that changed no weight."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else is written there; whoever wrote it reads and checks it."""

    def text(self) -> str:
        """What the file holds."""
        own = asdict(self)
        more = own.pop("more")
        return json.dumps({**own, **more})


def read_state(folder: Path) -> TrainingState:
    """The state in a checkpoint.

    Raises:
        ValueError: the file is missing, or holds anything else.
    """
    path = folder / STATE_FILE
    fields = Fields(read_json(path), str(path))
    return TrainingState(
        iteration=fields.count("iteration"),
        global_batch_size=fields.count("global_batch_size"),
        plan_key=fields.text("plan_key"),
        run_id=fields.optional_text("run_id"),
        config_sha256=fields.optional_text("config_sha256"),
        skipped_iterations=fields.optional_count("skipped_iterations") or 0,
    )
