"""What a run says last: kept beside its checkpoints and for the launch script, and printed by one rank.

`last_words.json` holds an ending's fields, and `run_id`, `restart` (torchrun's count), `time` (seconds since 1970) and
`previous`: code, step and cause of the ending before it, if there was one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_haplovl.operation.endings import Ending, ExitCode
from megatron_haplovl.operation.run_lock import is_of_another
from megatron_haplovl.parallel.launch import Launch

LAST_WORDS = "last_words.json"
LOST_PEER = "lost a peer"
"""Cause of an ending that only follows from another rank's. It gives way to any other cause."""
LAUNCHER_GONE = "launcher gone"
"""Cause of an ending that says nothing about the run itself, however often it comes."""
_FINAL = (ExitCode.NEEDS_PERSON, ExitCode.COME_BACK)
"""Endings behind which the launcher shall not start the ranks again."""


class LastWords:
    """Reads and writes the endings of one launch.

    Args:
        launch: this launch.
        save: the folder of the checkpoints; None without --save.
    """

    def __init__(self, launch: Launch, save: Path | None) -> None:
        self._launch = launch
        self._folders = [folder for folder in (save, launch.folder) if folder is not None]
        # Without --save, the folder of the launch remembers what ended the start before.
        self._before = self._read(launch.folder if save is None else save)
        if self._before is not None and self._is_of_this_start(self._before):
            self._before = self._before["previous"]
        self._speaking = threading.Lock()

    def of_earlier_start(self) -> Ending | None:
        """The ending of this launch before torchrun started the ranks again, if it shall not be started again."""
        for words in self._found():
            if words["restart"] < self._launch.restart and words["code"] in _FINAL:
                return _ending(words)
        return None

    def of_start_before(self, since: float) -> str | None:
        """The sentence of the start before this one; None if the folder has none of it.

        Args:
            since: when that start began (seconds since 1970); what was said earlier is of another one.
        """
        words = self._before
        return None if words is None or words.get("time", -1.0) < since else str(words["sentence"])

    def of_this_start(self) -> Ending | None:
        """What another rank has said already, if anything."""
        words = self._of_this_start()
        return None if words is None else _ending(words)

    def guarded(self, ending: Ending) -> Ending:
        """The ending; or one that needs a person, where a fault comes a second time at the same step."""
        before = self._before
        if ending.code != ExitCode.MACHINE_FAULT or ending.cause == LAUNCHER_GONE or before is None:
            return ending
        same = (before["step"], before["cause"]) == (ending.step, ending.cause)
        if not same or before["code"] not in (ExitCode.MACHINE_FAULT, ExitCode.NEEDS_PERSON):
            return ending
        where = "before the first step" if ending.step is None else f"after {ending.step} steps"
        sentence = f"{ending.sentence} (the second time in a row {where}, so starting again would not help)"
        return dataclasses.replace(ending, code=ExitCode.NEEDS_PERSON, sentence=sentence)

    def speak(self, ending: Ending, run_id: str = "") -> Ending:
        """Write an ending down, and print it, unless another rank was first.

        Args:
            ending: what this rank ends with.
            run_id: of this launch.

        Returns:
            The ending that holds for the run: this one, or that of the rank that was first.
        """
        with self._speaking, self._one_at_a_time():
            first = self._of_this_start()
            if first is not None and first["cause"] == LOST_PEER != ending.cause:
                first = None
            if first is not None:
                ending, run_id = _ending(first), first["run_id"]
            words = {
                **dataclasses.asdict(ending),
                "run_id": run_id,
                "restart": self._launch.restart,
                "time": time.time(),
                "previous": self._previous(),
            }
            for folder in self._folders:
                self._write(folder, words)
            if self._launch.is_scripted:
                _replace(self._launch.folder / "ending", f"{int(ending.code)}\n{ending.sentence}\n")
        _tell_torchrun(ending.sentence)
        if first is None:
            kind = "error: " if ending.code in (ExitCode.NEEDS_PERSON, ExitCode.MACHINE_FAULT) else ""
            sys.stdout.flush()
            sys.stderr.write(f"{kind}{ending.sentence}\n")
            sys.stderr.flush()
        return ending

    def status(self, ending: Ending) -> int:
        """The exit status of this process: 0 also where a launch script knows better than a launcher what to do.

        If the script itself is gone, a launcher that it has left behind must not start the ranks again.
        """
        is_final = ending.code in _FINAL or ending.cause == LAUNCHER_GONE
        return 0 if self._launch.is_scripted and is_final else int(ending.code)

    def _found(self) -> list[dict[str, Any]]:
        """What was said in this launch."""
        found = [self._read(folder) for folder in self._folders]
        return [words for words in found if words is not None and words["time"] >= self._launch.began]

    def _of_this_start(self) -> dict[str, Any] | None:
        return next((words for words in self._found() if self._is_of_this_start(words)), None)

    def _is_of_this_start(self, words: dict[str, Any]) -> bool:
        return bool(words["time"] >= self._launch.process_began)

    def _previous(self) -> dict[str, Any] | None:
        return self._before and {name: self._before[name] for name in ("code", "step", "cause")}

    def _read(self, folder: Path) -> dict[str, Any] | None:
        try:
            words: dict[str, Any] = json.loads((folder / LAST_WORDS).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            sys.stderr.write(f"{folder / LAST_WORDS} cannot be read, so the ending before is not known: {error}\n")
            return None
        return words

    def _write(self, folder: Path, words: dict[str, Any]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Whoever was refused, or has lost the folder, says nothing in another run's name.
            if not is_of_another(folder, words["run_id"]):
                _replace(folder / LAST_WORDS, json.dumps(words, indent=1) + "\n")
        except OSError as error:
            sys.stderr.write(f"{folder / LAST_WORDS} cannot be written, the run ends all the same: {error}\n")

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Ranks of this machine speak one after the other."""
        with contextlib.ExitStack() as stack:
            try:
                descriptor = os.open(self._launch.make_folder(), os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                sys.stderr.write(f"{self._launch.folder} cannot be used, so every rank speaks for itself: {error}\n")
            yield


def end_process(ending: Ending, words: LastWords, run_id: str = "") -> None:
    """Speak, and end this process from any thread, whatever the others do. It does not return.

    The loader's workers find within seconds that their rank is gone.
    """
    ending = words.speak(ending, run_id)
    os._exit(words.status(ending))


def _replace(path: Path, text: str) -> None:
    """The whole text or what was there before."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _ending(words: dict[str, Any]) -> Ending:
    fields = {field.name: words[field.name] for field in dataclasses.fields(Ending)}
    return Ending(**{**fields, "code": ExitCode(fields["code"])})


def _tell_torchrun(sentence: str) -> None:
    """Torchrun shows the contents of this file, by the format of `torch.distributed.elastic.multiprocessing.errors`."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}), encoding="utf-8")
