"""Weights & Biases: one run there for one --save folder, however often it is restarted."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

ID_FILE = "wandb_run_id"


class WeightsAndBiases:
    """Reports to a run there.

    Args:
        project: where the run belongs.
        settings: the whole configuration.
        save: the run's folder, which keeps the id; without it, every start is a run of its own.

    Raises:
        Exception: whatever wandb raises.
    """

    def __init__(self, project: str, settings: dict[str, Any], save: Path | None) -> None:
        import wandb

        self._run = wandb.init(
            project=project, id=_run_id(save), resume="allow", config=settings, allow_val_change=True
        )
        # A run that was resumed there counts on from its last step, and takes nothing for the steps before.
        self._first = self._run.step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """See :class:`Sink`."""
        if step >= self._first:
            self._run.log(dict(texts), step=step)

    def close(self) -> None:
        """See :class:`Sink`."""
        self._run.finish()


def _run_id(save: Path | None) -> str:
    """The id that the folder keeps, or a new one."""
    new = secrets.token_hex(4)
    if save is None:
        return new
    file = save / ID_FILE
    try:
        if file.is_file() and (kept := file.read_text().strip()):
            return kept
        save.mkdir(parents=True, exist_ok=True)
        file.write_text(new + "\n")
    except OSError as error:
        logger.warning(f"{file}: {error}; a restart will be another run for Weights & Biases")
    return new
