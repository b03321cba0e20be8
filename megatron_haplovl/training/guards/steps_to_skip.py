"""Steps that are passed over: those of --iterations-to-skip, and those that the run itself has put on a list.

SAVE/steps_to_skip.json    [{"step": 814, "plan_key": "...", "why": "..."}, ...]; steps are counted from 1
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_haplovl.checkpoint.files import write_text

LIST = "steps_to_skip.json"


class StepsToSkip:
    """What is passed over, and why.

    Args:
        flags: --iterations-to-skip.
        plan_key: of the training data; what was listed of other data is no reason.
        save: the --save folder, if there is one.

    Raises:
        ValueError: the list is damaged.
    """

    def __init__(self, flags: Iterable[int], plan_key: str, save: str | None) -> None:
        self._path = None if save is None else Path(save) / LIST
        self._plan_key = plan_key
        self._reasons = {
            entry["step"]: f"{entry['why']} ({self._path})"
            for entry in self._entries()
            if entry["plan_key"] == self._plan_key
        }
        self._reasons.update(dict.fromkeys(flags, "--iterations-to-skip"))

    def reason(self, step: int) -> str | None:
        """Why a step (counted from 1) is passed over; None if it is not."""
        return self._reasons.get(step)

    def add(self, step: int, why: str) -> None:
        """Put a step on the list, for the next start. Called by one rank.

        Raises:
            OSError: the list cannot be written.
        """
        assert self._path is not None
        entries = [*self._entries(), {"step": step, "plan_key": self._plan_key, "why": why}]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(entries, indent=1))

    def _entries(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        try:
            return [
                {"step": int(entry["step"]), "plan_key": str(entry["plan_key"]), "why": str(entry["why"])}
                for entry in json.loads(self._path.read_text(encoding="utf-8"))
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._path}: not a list of steps to skip; mend it, or delete it to skip none"
            ) from error

    @property
    def words(self) -> str | None:
        """For the log's first lines; None if nothing is passed over."""
        if not self._reasons:
            return None
        return "steps that are passed over: " + "; ".join(
            f"{step}, {reason}" for step, reason in sorted(self._reasons.items())
        )
