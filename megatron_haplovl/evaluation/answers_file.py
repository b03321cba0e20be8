"""`samples.jsonl` beside a run's checkpoints: the answers to its fixed questions, an object a line."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_haplovl.checkpoint.files import write_bytes

logger = logging.getLogger(__name__)

ANSWERS_FILE = "samples.jsonl"
"""Name of the file in the --save folder."""


@dataclass(frozen=True)
class SampleAnswer:
    """A line of the file."""

    step: int
    """Optimizer steps done."""
    question_id: str
    question: str
    """The prompt, with its image marks."""
    images: tuple[str, ...]
    """Paths of the image files."""
    answer: str
    token_ids: tuple[int, ...]
    """The answer, the token that ends it included."""
    has_ended: bool
    """False if the answer was cut off at --sample-max-new-tokens."""
    reference: str | None
    """The true answer, if the question file has one."""


class AnswersFile:
    """Writes the file. It only reports: a file that cannot be written is said once, and ends nothing.

    Args:
        folder: of the run's checkpoints.
        first_step: steps that the run goes on from. Lines of later steps, which will be done again, are taken out.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path, self._has_failed = folder / ANSWERS_FILE, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._cut(first_step)
        except OSError as error:
            self._fail(error)

    def append(self, answers: Sequence[SampleAnswer]) -> None:
        """Add the answers of a step."""
        lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            self._fail(error)

    def _cut(self, first_step: int) -> None:
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= first_step]
        if len(kept) == len(lines):
            return
        write_bytes(self._path, "".join(kept).encode())
        logger.info(
            f"{self._path}: {len(lines) - len(kept)} lines are half or of steps after {first_step}, which are done "
            "again; they are taken out"
        )

    def _fail(self, error: OSError) -> None:
        if not self._has_failed:
            logger.warning(f"{self._path} cannot be written: {error}; the run goes on, its answers are in the log only")
        self._has_failed = True


def _step_of(line: str) -> float:
    """The step of a line; infinite if it cannot be read, which a line of this file always can."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
    return step if isinstance(step, int) else float("inf")
