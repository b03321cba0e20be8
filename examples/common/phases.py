"""A phase of a run: one command, what it reads, what it writes, and whether it is done.

A phase is done when its command ended well with the same words, the same input files and the same earlier phases as
now; then it is not run again. Otherwise it starts from scratch: its outputs are removed first.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Phase:
    """One command of a run."""

    name: str
    """Unique within a run; names its log and its marker."""
    command: Sequence[str | Path]
    after: Sequence[Phase] = ()
    """Earlier phases whose results it reads."""
    inputs: Sequence[Path] = ()
    """Files that count, and folders of which every Python and Jinja file counts."""
    outputs: Sequence[Path] = ()
    """What it writes, inside the run folder."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of the runner."""
    resumes: bool = False
    """Whether its command goes on where it was stopped. Then its outputs stay if nothing else has changed."""

    @property
    def words(self) -> list[str]:
        """The words of the command."""
        return [str(word) for word in self.command]

    def shell_line(self) -> str:
        """The command as a shell takes it, with its variables before it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.words)])


def log_file(run: Path, phase: Phase) -> Path:
    """The whole output of a phase's command."""
    return run / "phases" / f"{phase.name}.log"


def marker_file(run: Path, phase: Phase) -> Path:
    """Says that a phase is done: its fingerprint and its seconds."""
    return run / "phases" / f"{phase.name}.json"


def check_phases(phases: Sequence[Phase], run: Path) -> None:
    """Refuse phases that cannot be run in this order, or would remove what is not theirs.

    Raises:
        ValueError: two have one name, one reads what no phase before it makes, or an output is outside the run folder.
    """
    earlier: list[Phase] = []
    for phase in phases:
        if phase.name in (other.name for other in earlier):
            raise ValueError(f"two phases have the name {phase.name!r}")
        for needed in phase.after:
            if needed not in earlier:
                raise ValueError(f"the earlier phase {needed.name!r} is not among the phases before {phase.name!r}")
        for path in phase.outputs:
            _check_inside(path, run)
        earlier.append(phase)


def fingerprint(command: Iterable[str], inputs: Iterable[Path], earlier_keys: Iterable[str]) -> str:
    """SHA-256 (hex) of everything that a phase's result depends on.

    Args:
        command: the words of the command.
        inputs: files, or folders of which every Python and Jinja file counts.
        earlier_keys: fingerprints of the phases whose results are read.
    """
    digest = hashlib.sha256("\0".join(command).encode())
    for path in _files(inputs):
        digest.update(f"\0{path}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    for key in earlier_keys:
        digest.update(key.encode())
    return digest.hexdigest()


def is_done(marker: Path, key: str) -> bool:
    """Whether the marker says that this very phase has ended well."""
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["key"] == key


def mark_done(run: Path, phase: Phase, key: str, seconds: float) -> None:
    """Write the marker."""
    text = json.dumps({"key": key, "seconds": round(seconds, 1)}) + "\n"
    marker_file(run, phase).write_text(text, encoding="utf-8")
    _begun_file(run, phase).unlink(missing_ok=True)


def prepare(run: Path, phase: Phase, key: str) -> None:
    """Make the run folder ready for a phase that is not done: no marker and, unless it resumes, no outputs.

    Raises:
        ValueError: an output is not inside the run folder; nothing is removed then.
    """
    begun = _begun_file(run, phase)
    begun.parent.mkdir(parents=True, exist_ok=True)
    marker_file(run, phase).unlink(missing_ok=True)
    goes_on = phase.resumes and begun.is_file() and begun.read_text(encoding="utf-8") == key
    if goes_on:
        return
    for path in phase.outputs:
        _check_inside(path, run)
    for path in phase.outputs:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    begun.write_text(key, encoding="utf-8")


def _begun_file(run: Path, phase: Phase) -> Path:
    """Holds the fingerprint of a phase that has begun and is not done."""
    return run / "phases" / f"{phase.name}.begun"


def _check_inside(path: Path, run: Path) -> None:
    if not path.resolve().is_relative_to(run.resolve()) or path.resolve() == run.resolve():
        raise ValueError(f"the output {path} is not inside the run folder {run}, so it is not removed")


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix in (".py", ".jinja"))
        else:
            yield path
