"""TensorBoard's event files.

torch's SummaryWriter writes in a thread of its own. The thread ends at the first error and leaves half a record, behind
which no reader goes on. So records are appended here, in TensorBoard's own form.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_haplovl.training.sinks.appended_file import AppendedFile


class TensorBoard:
    """A scalar for each value, under its name.

    Args:
        folder: receives an event file of this launch.
        first_step: steps that are done when the run starts; TensorBoard shows nothing of later ones from files before.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2

        self._event: Any = event_pb2.Event
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / f"{name}.{time.time_ns() % 10**9}")
        # The evaluation before the first step belongs to step 0.
        purged = first_step + 1 if first_step else 0
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append([self._event(file_version="brain.Event:2"), self._event(step=purged, session_log=start)])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Sink`."""
        from torch.utils.tensorboard.summary import scalar

        self._append([self._event(step=step, summary=scalar(name, value)) for name, value in values.items()])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """See :class:`Sink`."""
        from torch.utils.tensorboard.summary import text

        self._append([self._event(step=step, summary=text(name, words)) for name, words in texts.items()])

    def close(self) -> None:
        """See :class:`Sink`."""
        self._file.close()

    def _append(self, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records, now = io.BytesIO(), time.time()
        writer = RecordWriter(records)
        for event in events:
            event.wall_time = now
            writer.write(event.SerializeToString())
        self._file.append(records.getvalue())
