"""A place that gets every logged value, and the frame that keeps its errors from the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from megatron_haplovl.training.sinks.attempts import Attempts


class Sink(Protocol):
    """What the training writes its values to, on one rank. It may raise anything."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a log line or of an evaluation after `step` steps, by column."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts after `step` steps, such as answers, where they are shown."""

    def close(self) -> None:
        """Write what is still kept."""


class GuardedSink:
    """A sink whose errors are reported. One that could not be opened is opened with a later value.

    Args:
        name: what it is, for the log.
        open_sink: makes the sink.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self._attempt, self._open_sink = Attempts(name), open_sink
        self._sink: Sink | None = None
        self._attempt(self._open)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`; raises nothing."""
        self._attempt(lambda: self._open().write(step, values))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """See :class:`Sink`; raises nothing."""
        self._attempt(lambda: self._open().write_texts(step, texts))

    def close(self) -> None:
        """See :class:`Sink`; raises nothing."""
        if self._sink is not None:
            self._attempt(self._sink.close)

    def _open(self) -> Sink:
        if self._sink is None:
            self._sink = self._open_sink()
        return self._sink
