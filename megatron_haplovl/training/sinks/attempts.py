"""What only reports never ends a run: its errors are said once, and once more that it works again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_PAUSE = 100.0
"""An attempt that failed after t seconds is made again after 100 t seconds at the earliest: it costs less than 1 %."""


class Attempts:
    """Runs actions of one kind, whatever they raise.

    Args:
        name: what they write to, for the log.
        clock: seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._failing, self._again = False, 0.0

    def __call__(self, action: Callable[[], object]) -> None:
        """Run an action, unless one has failed just now."""
        started = self._clock()
        if self._failing and started < self._again:
            return
        try:
            action()
        except Exception as error:  # Whatever a tracker raises: the training does not depend on it.
            if not self._failing:
                logger.warning(f"{self._name}: {type(error).__name__}: {error}; the run goes on without it")
            now = self._clock()
            self._failing, self._again = True, now + _PAUSE * (now - started)
        else:
            if self._failing:
                logger.warning(f"{self._name}: works again")
            self._failing = False
