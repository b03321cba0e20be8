"""PREFIX.parts: what a preprocessing has finished, part by part, so that it can be ended at any moment and go on later.

settings.json       everything that the result depends on
ends.json           number of parts of each input file; written when all parts have been made
00000-000017/       a part: the files of a prefix called `part`, its report, and part.json; it gets this name by a
                    rename when all of them are complete
making-.../, joined/    what is being written; removed by the next run
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_haplovl.data.manifest import IMAGES, REPORT_SUFFIX, read_manifest

_SETTINGS, _ENDS, _LOCK, _PART, _JOINED = "settings.json", "ends.json", "lock", "part", "joined"


@dataclass(frozen=True)
class PartDone:
    """A part that is complete."""

    name: str
    records: int
    """Records that were read for it; none if the file ends before it, and then there are no files."""
    bad: int
    """How many of them cannot be used."""


class PartsFolder:
    """The folder, held by this process alone. Made by :func:`open_parts`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clean(self) -> None:
        """Remove what was being written. Nobody else may be writing."""
        for leftover in (*self.path.glob("making-*"), self.path / _JOINED):
            shutil.rmtree(leftover, ignore_errors=True)

    def begin_joining(self) -> Path:
        """An empty place: the prefix to join the parts at."""
        folder = self.path / _JOINED
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder / _PART

    def prefix(self, name: str) -> str:
        """Prefix of a part's files."""
        return str(self.path / name / _PART)

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A prefix to write a part at. When the block ends well, the part is there; otherwise nothing is left."""
        aside = self.path / f"making-{os.getpid()}-{name}"
        aside.mkdir()
        try:
            yield aside / _PART
            # After a power failure a name may stand for bytes that were never written. The other files are compared
            # with their checksums before they are used again; the images are too large for that.
            _sync(aside / f"{_PART}{IMAGES}.bin")
            os.rename(aside, self.path / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def names(self) -> list[str]:
        """Names of the parts that are there, complete or not."""
        return sorted(path.name for path in self.path.glob("*-*/") if not path.name.startswith("making-"))

    def finished(self) -> dict[str, PartDone]:
        """Parts that are there, by name. What is damaged, or was being removed when a run ended, goes.

        All files but the images are read and compared with their checksums.
        """
        found: dict[str, PartDone] = {}
        for name in self.names():
            prefix = self.prefix(name)
            try:
                done = PartDone(**json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")))
                is_complete = done.name == name and Path(prefix + REPORT_SUFFIX).is_file() and _is_sound(prefix)
            except (OSError, ValueError, TypeError):
                is_complete = False
            if is_complete:
                found[name] = done
            else:
                self.remove(name)
        return found

    def remove(self, name: str) -> None:
        """Take a part away, to make it again."""
        shutil.rmtree(self.path / name)

    def ends(self) -> dict[int, int] | None:
        """Number of parts of each input file, if all parts were made at some time."""
        try:
            text = (self.path / _ENDS).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return {int(file): int(parts) for file, parts in json.loads(text).items()}

    def write_ends(self, ends: Mapping[int, int]) -> None:
        """Say that all parts have been made."""
        _write(self.path / _ENDS, {str(file): parts for file, parts in sorted(ends.items())})

    def discard(self) -> None:
        """Remove everything, because the joined files are there or because nothing is worth keeping."""
        shutil.rmtree(self.path, ignore_errors=True)


def write_part(prefix: Path, done: PartDone) -> None:
    """Write what a part consists of, beside its files."""
    Path(f"{prefix}.json").write_text(json.dumps(asdict(done)) + "\n", encoding="utf-8")


@contextlib.contextmanager
def open_parts(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[PartsFolder, str | None]]:
    """Open the folder of a prefix, and make it if it is not there. Leftovers of a run that was killed go.

    Args:
        prefix: the prefix that the parts will be joined to.
        settings: everything that the result depends on, as JSON has it.

    Returns:
        The folder; and a sentence if an earlier run's parts were removed. That happens if that run came to its end: its
        bad records were looked at, and something has been changed since.

    Raises:
        ValueError: another process works in it, or it has parts of a run with other settings that was not finished.
    """
    path = Path(f"{prefix}.parts")
    path.mkdir(parents=True, exist_ok=True)
    with (path / _LOCK).open("w") as lock:
        try:
            # A lock of this kind is not inherited by a fork, and ends with the process.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is preprocessing to {prefix} (it holds {lock.name})") from error
        folder, said = PartsFolder(path), None
        folder.clean()
        settings = json.loads(json.dumps(settings))
        before = _read_settings(path / _SETTINGS)
        if before is not None and before != settings:
            said = _begin_anew(folder, before, settings)
            before = None
        if before is None:
            _write(path / _SETTINGS, settings)
        try:
            yield folder, said
        finally:
            folder.clean()
            if not folder.names():
                folder.discard()


def _begin_anew(folder: PartsFolder, before: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
    parts = folder.names()
    if parts and folder.ends() is None:
        raise ValueError(
            f"{folder.path} holds {len(parts)} parts of a run that was not finished and had other settings; "
            f"{_difference(other[0], before, settings)}; give the same settings again, or remove the folder"
        )
    for name in parts:
        folder.remove(name)
    (folder.path / _ENDS).unlink(missing_ok=True)
    if not parts:
        return None
    return f"beginning anew: {folder.path} held {len(parts)} parts with other settings ({', '.join(other)})"


def _difference(key: str, before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    then, now = before.get(key), settings.get(key)
    if isinstance(then, list) and isinstance(now, list):
        then, now = ([item for item in here if item not in there] for here, there in ((then, now), (now, then)))
    return f"{key} was {str(then)[:150]} then and is {str(now)[:150]} now"


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _write(path: Path, value: Any) -> None:
    aside = path.with_suffix(".aside")
    try:
        aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _is_sound(prefix: str) -> bool:
    files = read_manifest(prefix).files
    del files[f"{IMAGES}.bin"]
    return all(hashlib.sha256(Path(prefix + s).read_bytes()).hexdigest() == e.sha256 for s, e in files.items())


def _sync(path: Path) -> None:
    """Wait until a file is on the disk: after a power failure a name would stand for nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
