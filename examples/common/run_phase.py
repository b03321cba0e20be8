"""Run one phase of an example once: remember that it is done, show how it goes, keep its whole output in a log.

    python -m examples.common.run_phase --run runs/quickstart --name data --inputs examples/quickstart -- COMMAND ...

A phase is done when its command ended well with the same words, the same input files and the same earlier phases
(`--after`) as now; then it is not run again. Otherwise it starts from scratch: its `--output` paths are removed first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

_SECONDS_BETWEEN_LINES = 5.0
_LINES_SHOWN_AFTER_FAILURE = 30
_LONGEST_LINE = 150
_SHOWN_COLUMNS = ("iteration", "loss", "accuracy")


def main() -> int:
    args = _parse_args()
    folder = args.run / "phases"
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f"{args.name}.json"
    key = fingerprint(args.command, args.inputs, [folder / f"{name}.json" for name in args.after])
    if is_done(marker, key):
        print(f"[{args.name}] done before, kept", flush=True)
        return 0
    marker.unlink(missing_ok=True)
    for path in args.output:
        _remove(path, inside=args.run)
    log = folder / f"{args.name}.log"
    print(f"[{args.name}] started (log: {log})", flush=True)
    started = time.monotonic()
    status = run(args.command, log, args.name)
    seconds = time.monotonic() - started
    if status != 0:
        return status
    marker.write_text(json.dumps({"key": key, "seconds": round(seconds, 1)}) + "\n", encoding="utf-8")
    print(f"[{args.name}] done in {seconds:.0f} s", flush=True)
    return 0


def fingerprint(command: Iterable[str], inputs: Iterable[Path], earlier_markers: Iterable[Path]) -> str:
    """SHA-256 (hex) of everything that a phase's result depends on.

    Args:
        command: the words of the command.
        inputs: files, or folders of which every Python and Jinja file counts.
        earlier_markers: markers of the phases whose results are read.

    Raises:
        ValueError: an earlier phase is not done.
    """
    digest = hashlib.sha256("\0".join(command).encode())
    for path in _files(inputs):
        digest.update(f"\0{path}\0".encode() + path.read_bytes())
    for marker in earlier_markers:
        if not marker.is_file():
            raise ValueError(f"the earlier phase {marker.stem!r} is not done: {marker} does not exist")
        digest.update(json.loads(marker.read_text(encoding="utf-8"))["key"].encode())
    return digest.hexdigest()


def is_done(marker: Path, key: str) -> bool:
    """Whether the marker says that this very phase has ended well."""
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["key"] == key


def run(command: list[str], log: Path, name: str) -> int:
    """Run a command with its output in `log`; now and then show a line of it, and its end if it fails.

    Returns:
        The command's exit status.
    """
    last_lines: deque[str] = deque(maxlen=_LINES_SHOWN_AFTER_FAILURE)
    shown = 0.0
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        for line in process.stdout:  # universal newlines: the \r of a progress bar ends a line, too
            file.write(line)
            file.flush()
            if line.strip():
                last_lines.append(line.rstrip())
                if time.monotonic() - shown >= _SECONDS_BETWEEN_LINES:
                    shown = time.monotonic()
                    print(f"[{name}] {shorten(line.strip())}", flush=True)
        status = process.wait()
    if status != 0:
        print(f"[{name}] failed with exit status {status}; the end of {log}:", file=sys.stderr)
        print("\n".join(last_lines), file=sys.stderr, flush=True)
    return status


def shorten(line: str) -> str:
    """Of a training log line keep the iteration, the losses and the accuracies; cut any other line."""
    if line.startswith(("iteration", "validation")):
        columns = (column.strip() for column in line.split("|"))
        line = " | ".join(column for column in columns if any(word in column for word in _SHOWN_COLUMNS))
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix in (".py", ".jinja"))
        else:
            yield path


def _remove(path: Path, inside: Path) -> None:
    if not path.resolve().is_relative_to(inside.resolve()) or path.resolve() == inside.resolve():
        raise ValueError(f"--output {path} is not inside the run folder {inside}, so it is not removed")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the whole run; markers and logs go below it")
    parser.add_argument("--name", required=True, help="name of the phase")
    parser.add_argument("--after", nargs="*", default=[], metavar="NAME", help="phases whose results this one reads")
    parser.add_argument("--inputs", type=Path, nargs="*", default=[], help="files and folders that count")
    parser.add_argument("--output", type=Path, nargs="*", default=[], help="what the phase writes, below --run")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    args = parser.parse_args()
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command given behind --")
    return args


if __name__ == "__main__":
    sys.exit(main())
