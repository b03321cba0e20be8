"""One run at a time writes to a --save folder: `run.lock` in it says which, and a heartbeat that it is alive.

The file is made, and taken over, by way of a second file, whose name says which lock it is to replace
(`.run.lock.after-...`). Only one process can make that file, and its renaming both takes the lock and frees the name.
So of several processes that find a dead holder one wins, on any file system that knows exclusive creation and renaming.

A heartbeat is the lock's time of modification, as the file system's own clock gives it. It is only ever compared with
itself and with that clock, because the clocks of machines differ.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_haplovl.checkpoint.files import to_disk
from megatron_haplovl.operation.holder import Holder

if TYPE_CHECKING:
    # torch takes seconds, and the last words of a signal that comes meanwhile look at locks.
    from megatron_haplovl.parallel.groups import Group

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""A holder on another machine is dead when its heartbeat has not moved for so long."""
GRACE_SECONDS = 10.0
"""A live holder has so long to end: a restart may come before the ranks that it replaces are gone."""
_ROUND_SECONDS, _POLL_SECONDS = 2.0, 0.2
_MAX_BYTES = 1 << 16


class RunLock:
    """A lock that this process holds.

    Args:
        path: the lock's file.
        holder: this process, as the file names it.
    """

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path, self._holder = path, holder
        self.lost: str | None = None
        """A sentence, when the heartbeat has found that another run holds the lock."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def check(self) -> None:
        """Make sure, just before something in the folder is changed, that this process still holds the lock.

        Raises:
            ValueError: it does not.
            OSError: the file system does not answer.
        """
        seen = _read(self._path)
        if seen is None or seen.text != self._holder.text():
            raise ValueError(self._loss(seen))

    def release(self) -> None:
        """Give the lock back, if this process still holds it."""
        atexit.unregister(self.release)
        if self._holder.pid != os.getpid():  # a child that was forked
            return
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            seen = _read(self._path)
            if seen is not None and seen.text == self._holder.text():
                self._path.unlink()

    def _keep_beating(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            try:
                with self._path.open("rb") as file:
                    text = file.read(_MAX_BYTES).decode(errors="replace")
                    if text == self._holder.text():
                        os.utime(file.fileno())
                        continue
                    self.lost = self._loss(_Seen(text, 0))
            except FileNotFoundError:
                self.lost = self._loss(None)
            except OSError:
                # A file system that is away is not a lost lock.
                continue
            return

    def _loss(self, seen: _Seen | None) -> str:
        other = None if seen is None else Holder.parse(seen.text)
        what = "is gone" if seen is None else f"is that of {other or 'another run'} now"
        return (
            f"{self._path} {what}: {self._holder} was stopped or cut off for so long that it was taken for dead, or "
            "the file was removed; it ends and publishes nothing more"
        )


def take_run_lock(folder: Path, run_id: str, control: Group, progress: Callable[[], None]) -> RunLock | None:
    """Take the lock of a --save folder, which is made if there is none. Called by every rank.

    Args:
        folder: --save.
        run_id: see `Operation.run_id`.
        control: all ranks.
        progress: called now and then while the lock may yet come free.

    Returns:
        The lock on the first rank, None on the others.

    Raises:
        ValueError: another run holds it, or the folder cannot be written to.
    """
    attempt = _Attempt(folder, run_id) if control.rank == 0 else None
    while True:
        # In rounds, because the other ranks' patience with a collective may be shorter than this one's.
        taken = control.together(lambda: None if attempt is None else attempt.take())
        if control.gather_objects(taken is not None)[0]:
            return taken
        progress()


def is_of_another(folder: Path, run_id: str) -> bool:
    """Whether a --save folder is that of another run, which may be alive.

    Raises:
        OSError: the file system does not answer.
    """
    seen = _read(folder / LOCK_FILE)
    holder = None if seen is None else Holder.parse(seen.text)
    return holder is not None and holder.run_id != run_id and not (holder.is_here and holder.is_gone)


@dataclass(frozen=True)
class _Seen:
    """A lock's file."""

    text: str
    mtime: int
    """Nanoseconds."""


def _read(path: Path) -> _Seen | None:
    """The file as it is now: a file that is opened is fresh even where a network file system remembers its state."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode(errors="replace")
            return _Seen(text, os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


class _Attempt:
    """Tries to get the lock until its holder's death or life is certain."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._folder, self._path, self._run_id = folder, folder / LOCK_FILE, run_id
        self._begun = time.monotonic()
        self._unmoved: dict[Path, tuple[_Seen, float, float]] = {}
        """File -> how it was seen, since when it has been so, and how long it may be so."""

    def take(self) -> RunLock | None:
        """Try for about two seconds.

        Raises:
            ValueError: another run is alive, or the folder cannot be written to.
        """
        end = time.monotonic() + _ROUND_SECONDS
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                seen = _read(self._path)
                reason = "" if seen is None else self._why_dead(self._path, seen)
                if reason is not None and (lock := self._replace(seen)) is not None:
                    if reason:
                        logger.warning(reason)
                    return lock
                if time.monotonic() >= end:
                    return None
                time.sleep(_POLL_SECONDS)
        except OSError as error:
            raise ValueError(f"--save {self._folder}: no checkpoint can be written there ({error})") from error

    def _why_dead(self, path: Path, seen: _Seen) -> str | None:
        """A sentence about the takeover (none between runs of this process); None if the holder may be alive.

        Raises:
            ValueError: the holder of the lock is alive, and has had time to end.
        """
        holder = Holder.parse(seen.text)
        if holder is not None and holder.is_here:
            if holder.is_this_process:
                return ""
            if holder.is_gone:
                return f"{path}: taken over from {holder}, which is no longer running"
            self._refuse_in_time(path, holder, "was stopped by a signal" if holder.is_stopped else "is alive")
            return None
        before, since, patience = self._unmoved.get(path, (None, 0.0, 0.0))
        now = time.monotonic()
        if before == seen:
            if now - since < patience:
                return None
            return f"{path}: taken over from {holder or 'a run'}, whose heartbeat has stood still for {patience:.0f} s"
        if before is not None and before.text == seen.text:
            self._refuse_in_time(path, holder, "is alive (its heartbeat moves)")
            age = 0.0
        else:
            age = self._age(seen)
        # Some beats are waited for in any case: the file system may have been away from its holder, too.
        self._unmoved[path] = (seen, now, max(2.5 * BEAT_SECONDS, SILENCE_SECONDS - age))
        return None

    def _refuse_in_time(self, path: Path, holder: Holder | None, how: str) -> None:
        if path != self._path or time.monotonic() - self._begun < GRACE_SECONDS:
            return
        end_it = f"end it (kill {holder.pid} on {holder.host})" if holder else "end it"
        raise ValueError(
            f"--save {self._folder} belongs to {holder or 'another run'}, which {how}; two runs in one folder would "
            f"destroy each other's checkpoints: wait until it has ended, {end_it}, or give another --save"
        )

    def _age(self, seen: _Seen) -> float:
        """Seconds since the last beat, by the clock of the file system."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=f".{LOCK_FILE}.now-") as probe:
            return max(0.0, (os.fstat(probe.fileno()).st_mtime_ns - seen.mtime) / 1e9)

    def _replace(self, seen: _Seen | None) -> RunLock | None:
        """Put this process's lock in the place of the one that was seen, unless another process is faster."""
        replaces = "nobody" if seen is None else hashlib.sha256(seen.text.encode()).hexdigest()[:16]
        successor = self._folder / f".{LOCK_FILE}.after-{replaces}"
        holder = Holder.this_process(self._run_id)
        try:
            descriptor = os.open(successor, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            left = _read(successor)
            if left is not None and self._why_dead(successor, left) is not None:
                successor.unlink(missing_ok=True)
            return None
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(holder.text())
                file.flush()
                os.fsync(file.fileno())
            now = _read(self._path)
            if (None if now is None else now.text) != (None if seen is None else seen.text):
                successor.unlink(missing_ok=True)
                return None
            # If this process was taken for dead meanwhile, the file is gone, or another process's.
            with contextlib.suppress(FileNotFoundError):
                successor.rename(self._path)
        except OSError:
            successor.unlink(missing_ok=True)
            raise
        to_disk(self._folder)
        now = _read(self._path)
        return RunLock(self._path, holder) if now is not None and now.text == holder.text() else None
