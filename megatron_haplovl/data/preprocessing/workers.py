"""Makes parts, in this process or in several. A worker takes a whole part: it reads, encodes, decodes and writes."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_haplovl.data.hashed_files import HashedFile
from megatron_haplovl.data.manifest import REPORT_SUFFIX
from megatron_haplovl.data.preprocessing.parts_folder import PartDone, PartsFolder, write_part
from megatron_haplovl.data.preprocessing.prefix_writer import PrefixWriter
from megatron_haplovl.data.preprocessing.processor import BadRecord, LeftOut, RecordProcessor
from megatron_haplovl.data.preprocessing.record_source import PartRange, RecordSource

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerGoneError(RuntimeError):
    """A worker process has ended, and nobody asked it to."""


class PartMaker:
    """Makes one part after another."""

    def __init__(self, processor: RecordProcessor, source: RecordSource, folder: PartsFolder) -> None:
        self._processor = processor
        self._source = source
        self._folder = folder

    def make(self, part: PartRange) -> PartDone:
        """Make a part, or find out that the file ends before it.

        Raises:
            ValueError: the input is damaged, or an image is changed meanwhile.
            OSError: the part cannot be written.
        """
        records = self._source.read(part)
        first = next(records, None)
        if first is None:
            return PartDone(part.name, 0, 0)
        number, bad, reasons = 0, 0, Counter[str]()
        placeholders = self._processor.tokenizer.placeholder_ids
        with self._folder.making(part.name) as prefix:
            with PrefixWriter(prefix) as writer, HashedFile(Path(f"{prefix}{REPORT_SUFFIX}")) as report:
                for raw in chain((first,), records):
                    number += 1
                    result = self._processor.process(raw)
                    if isinstance(result, BadRecord):
                        bad += not isinstance(result, LeftOut)
                        reasons[result.reason] += 1
                        report.write((json.dumps(asdict(result)) + "\n").encode())
                        continue
                    for sample in result:
                        writer.add(sample, placeholders)
                writer.finish(self._processor.origin, self._processor.num_frames, reasons)
            done = PartDone(part.name, number, bad)
            write_part(prefix, done)
        return done


class Crew(Protocol):
    """Who makes parts."""

    @property
    def has_room(self) -> bool:
        """Whether somebody waits for a part."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody has a part."""

    def give(self, part: PartRange) -> None:
        """Have a part made."""

    def poll(self, *, block: bool) -> list[PartDone]:
        """Parts that have been made since; with `block` at least one, if any are being made.

        Raises:
            ValueError, OSError: as :meth:`PartMaker.make`.
            WorkerGoneError: a worker process has ended.
        """

    def __enter__(self) -> Crew: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class OneProcess:
    """This process."""

    def __init__(self, maker: PartMaker) -> None:
        self._maker = maker
        self._part: PartRange | None = None

    @property
    def has_room(self) -> bool:
        """Whether it waits for a part."""
        return self._part is None

    @property
    def is_idle(self) -> bool:
        """Whether it has none."""
        return self._part is None

    def give(self, part: PartRange) -> None:
        """Keep a part until it is asked for."""
        self._part = part

    def poll(self, *, block: bool) -> list[PartDone]:
        """Make the part, with `block`."""
        if not block or self._part is None:
            return []
        part, self._part = self._part, None
        return [self._maker.make(part)]

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    part: PartRange | None = None


@dataclass(frozen=True)
class _Failure:
    """What went wrong in a worker."""

    kind: str
    text: str
    number: int = 0
    path: str | None = None

    def reraise(self) -> None:
        if self.kind == "OSError":
            raise OSError(self.number, self.text, self.path)
        raise ValueError(self.text) if self.kind == "ValueError" else RuntimeError(f"in a worker process:\n{self.text}")


class Workers:
    """Worker processes. They end when this process does, however it ends.

    Args:
        maker: built before, so that a forked worker has its tokenizer without loading it.
        count: number of processes.
    """

    def __init__(self, maker: PartMaker, count: int) -> None:
        self._maker = maker
        self._count = count
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        # Forking is quick, and safe here: nothing has started a thread yet.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            # A worker that held the other end of another's pipe would keep that one alive.
            not_yours = [worker.connection for worker in self._workers] + [ours]
            arguments = (self._maker, theirs, not_yours if sys.platform == "linux" else [], os.getpid())
            process: BaseProcess = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    @property
    def has_room(self) -> bool:
        """Whether a worker waits for a part."""
        return any(worker.part is None for worker in self._workers)

    @property
    def is_idle(self) -> bool:
        """Whether all of them do."""
        return all(worker.part is None for worker in self._workers)

    def give(self, part: PartRange) -> None:
        """Send a part to a worker that waits."""
        worker = next(worker for worker in self._workers if worker.part is None)
        worker.part = part
        try:
            worker.connection.send(part)
        except OSError as error:
            raise _gone(worker) from error

    def poll(self, *, block: bool) -> list[PartDone]:
        """Parts that have been made since."""
        busy = {worker.connection: worker for worker in self._workers if worker.part is not None}
        made: list[PartDone] = []
        # A dead worker's connection can be read: it has ended.
        for connection in wait(list(busy), None if block else 0) if busy else ():
            assert isinstance(connection, Connection)
            worker = busy[connection]
            try:
                result = connection.recv()
            except (EOFError, OSError) as error:
                raise _gone(worker) from error
            worker.part = None
            if isinstance(result, _Failure):
                result.reraise()
            made.append(result)
        return made


def _gone(worker: _Worker) -> WorkerGoneError:
    worker.process.join(timeout=10)
    code = worker.process.exitcode
    killed = code is not None and code < 0
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and killed else f"ended with status {code}"
    hint = ", perhaps because the memory is full: fewer --workers need less" if code == -signal.SIGKILL else ""
    part = "" if worker.part is None else f" while it made part {worker.part.name}"
    return WorkerGoneError(f"worker process {worker.process.pid} {how}{part}{hint}")


def _work(maker: PartMaker, connection: Connection, not_yours: list[Connection], parent: int) -> None:
    """The life of a worker process."""
    # The main process ends its workers; a Ctrl-C goes to all of them at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for other in not_yours:
        other.close()
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        connection.send(_make(maker, part))


def _make(maker: PartMaker, part: PartRange) -> PartDone | _Failure:
    try:
        return maker.make(part)
    except OSError as error:
        return _Failure("OSError", error.strerror or str(error), error.errno or 0, error.filename)
    except ValueError as error:
        return _Failure("ValueError", str(error))
    except Exception:
        return _Failure("other", traceback.format_exc())
