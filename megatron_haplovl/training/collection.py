"""Python's garbage collection at the same step on every rank, so that ranks do not wait for one another's pauses."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from megatron_haplovl.config.schema import RunConfig


class GarbageCollection:
    """Automatic, as Python does it, or by hand (--manual-gc).

    Args:
        config: says when.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        if config.manual_gc:
            gc.disable()
            gc.collect()

    def after_step(self, step: int) -> None:
        """Collect, if it is due after so many steps."""
        interval = self._config.manual_gc_interval
        if self._config.manual_gc and interval and step % interval == 0:
            gc.collect()

    @contextlib.contextmanager
    def around_evaluation(self) -> Iterator[None]:
        """Collect before and after an evaluation, unless that is turned off."""
        wanted = self._config.manual_gc and self._config.manual_gc_eval
        if wanted:
            gc.collect()
        yield
        if wanted:
            gc.collect()

    def close(self) -> None:
        """Leave it to Python again."""
        if self._config.manual_gc:
            gc.enable()
