"""Where a run stands: the position in the data, and which run it is. One small file of every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint.typed import Fields
from megatron_haplovl.config.files import read_json
from megatron_haplovl.config.schema import Config

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
    rampup_batch_size: tuple[int, ...] = ()
    """How the global batch came to be that large; not written without a ramp."""
    skipped_iterations: int = 0
    """Those of them that changed no weight."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else is written there; whoever wrote it reads and checks it."""

    def text(self) -> str:
        """What the file holds."""
        own = asdict(self)
        more = own.pop("more")
        if not self.rampup_batch_size:
            del own["rampup_batch_size"]
        return json.dumps({**own, **more})


def state_of(config: Config, iteration: int, plan_key: str, run_id: str, more: Mapping[str, Any]) -> TrainingState:
    """Where a run stands that is about to save.

    Args:
        config: its settings.
        iteration: optimizer steps done.
        plan_key: the training data's `BatchLoader.plan_key`.
        run_id: see `Operation.run_id`.
        more: see :class:`TrainingState`.
    """
    schedule = config.schedule
    return TrainingState(
        iteration,
        schedule.global_batch_size,
        plan_key,
        run_id,
        rampup_batch_size=schedule.rampup_batch_size,
        more=more,
    )


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
        rampup_batch_size=tuple(fields.optional_counts("rampup_batch_size")),
        skipped_iterations=fields.optional_count("skipped_iterations") or 0,
    )
