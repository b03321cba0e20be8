"""However a preprocessing ends, it says so in one sentence, leaves no process, and the next run finishes it.

The program runs in a forked child here, because a fresh one would spend seconds with its imports.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_haplovl.commands.preprocess import main
from megatron_haplovl.data import hashed_files
from megatron_haplovl.data.manifest import DATA_SUFFIXES, read_manifest
from megatron_haplovl.data.preprocessing.parts_folder import PartsFolder
from tests.conftest import make_llava_dataset

RECORDS = 240
FORK: Any = multiprocessing.get_context("fork")


@dataclass
class Job:
    """The same preprocessing, to another prefix each time."""

    flags: list[str]
    expected: dict[str, bytes]
    folder: Path

    def main(self, *more: str) -> int:
        return main([*self.flags, f"--output-prefix={self.folder}/x", *more])

    def start(self, *more: str, before: Callable[[], None] = lambda: None, hold: int | None = None) -> Any:
        """Run it in a child; its sentence goes to a file.

        With `hold`, parts beyond that number are not finished before :meth:`release`: however slow the test is, it
        finds the child at work.
        """

        def child() -> None:
            sys.stderr = (self.folder.parent / "stderr").open("w", buffering=1)
            before()
            if hold is not None:
                self._hold_renames(hold)
            os._exit(self.main(*more))

        process = FORK.Process(target=child)
        process.start()
        return process

    def _hold_renames(self, parts: int) -> None:
        rename = os.rename

        def held(source: Any, target: Any) -> None:
            while len(self.parts) >= parts and not self._released.exists():
                time.sleep(0.002)
            rename(source, target)

        os.rename = held  # type: ignore[assignment]

    @property
    def _released(self) -> Path:
        return self.folder.parent / "released"

    def release(self) -> None:
        """Let a child that is held go on."""
        self._released.touch()

    @property
    def said(self) -> str:
        """The last line that a child wrote; there must be no traceback above it."""
        text = (self.folder.parent / "stderr").read_text()
        assert "Traceback" not in text
        return text.splitlines()[-1]

    @property
    def parts(self) -> list[str]:
        return PartsFolder(self.folder / "x.parts").names()

    def leftovers(self) -> list[str]:
        """What is there beside the prefix's files and finished parts."""
        found = [path.name for path in self.folder.glob(".*")] + [path.name for path in self.folder.glob("*.aside")]
        return (
            found
            + [path.name for path in (self.folder / "x.parts").glob("*") if path.name in ("joined",)]
            + [path.name for path in (self.folder / "x.parts").glob("making-*")]
        )

    def is_complete(self) -> bool:
        """Whether the files are those of a run without faults, and nothing else is there."""
        return files_of(self.folder) == self.expected


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"a folder" for path in folder.iterdir()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_spm_model: Path) -> Job:
    folder = tmp_path_factory.mktemp("faults")
    dataset = make_llava_dataset(folder / "data", RECORDS)
    flags = [f"--input={dataset.json}", f"--image-folder={dataset.image_folder}", "--chat-template=vicuna_v1"]
    flags += [f"--tokenizer-model={tiny_spm_model}", "--records-per-part=10"]
    job = Job(flags, {}, folder / "undisturbed")
    job.folder.mkdir()
    assert job.main("--workers=1") == 0
    return Job(flags, files_of(job.folder), folder)


@pytest.fixture
def job(base: Job, tmp_path: Path) -> Job:
    folder = tmp_path / "out"
    folder.mkdir()
    return Job(base.flags, base.expected, folder)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


def wait_for_parts(job: Job, number: int) -> None:
    wait_until(lambda: len(job.parts) >= number)


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_random_points(job: Job, workers: int) -> None:
    rng = random.Random(workers)
    kills = 0
    while kills < 10:
        process = job.start(f"--workers={workers}")
        process.join(timeout=rng.uniform(0.05, 0.6))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert job.is_complete()
            for path in job.folder.iterdir():
                path.unlink()
    assert job.main("--workers=2") == 0
    assert job.is_complete()


def kill_at(number: int, owner: Any, name: str) -> Callable[[], None]:
    """Make a function end the process without a word, the `number`-th time it is called."""

    def install() -> None:
        original, calls = getattr(owner, name), [0]

        def function(*args: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        setattr(owner, name, function)

    return install


def test_killed_at_every_rename(job: Job) -> None:
    """Those of the parts, of the settings, and of the files of the prefix, the manifest last."""
    seen = 0
    for name in ("rename", "replace"):
        for number in range(1, 100):
            process = job.start("--workers=1", "--records-per-part=120", before=kill_at(number, os, name))
            process.join()
            if process.exitcode == 0:
                break
            # Each run goes on from what the one before left, so that all of them together are quick.
            seen += 1
    assert job.is_complete()
    # Two parts; settings and ends; the files of the prefix and its manifest.
    assert seen == 2 + 2 + len(DATA_SUFFIXES) + 1


def test_a_rerun_names_the_parts_and_uses_them(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    process = job.start("--workers=1", hold=5)
    wait_for_parts(job, 5)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    there = job.parts
    times = {name: (job.folder / "x.parts" / name).stat().st_mtime_ns for name in there}
    process = job.start("--workers=2", before=kill_at(1, hashed_files, "copy_range"))
    process.join()
    assert {name: (job.folder / "x.parts" / name).stat().st_mtime_ns for name in there} == times
    capsys.readouterr()
    assert job.main("--workers=2") == 0
    assert f"continuing: {len(there)} parts are there" in (job.folder.parent / "stderr").read_text()
    assert "parts are there, in" in capsys.readouterr().err
    assert job.is_complete()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_signal(job: Job, number: int, status: int, workers: int) -> None:
    process = job.start(f"--workers={workers}", hold=2)
    wait_for_parts(job, 2)
    workers_then = children_of(process.pid)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status
    assert not any(map(is_alive, workers_then)) and len(workers_then) == (workers if workers > 1 else 0)
    assert f"stopped by {signal.Signals(number).name}; {len(job.parts)} parts are kept in {job.folder}" in job.said
    assert job.leftovers() == []
    assert job.main("--workers=2") == 0 and job.is_complete()


def test_a_signal_before_anything_is_finished_leaves_nothing(job: Job) -> None:
    process = job.start("--workers=2", "--records-per-part=100000", hold=0)
    wait_until(lambda: any((job.folder / "x.parts").glob("making-*/part.bin")))
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143 and job.said.endswith("stopped by SIGTERM; nothing was written")
    assert list(job.folder.iterdir()) == []


def test_workers_end_with_the_main_process(job: Job) -> None:
    process = job.start("--workers=3", hold=2)
    wait_for_parts(job, 2)
    workers = children_of(process.pid)
    assert len(workers) == 3
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: not any(map(is_alive, workers)))
    assert job.main("--workers=2") == 0 and job.is_complete()


def test_a_killed_worker(job: Job) -> None:
    process = job.start("--workers=3", hold=2)
    wait_for_parts(job, 2)
    workers = children_of(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    process.join()
    assert process.exitcode == 70
    assert f"worker process {workers[1]} was killed by SIGKILL while it made part" in job.said
    assert "fewer --workers" in job.said and f"{len(job.parts)} parts are kept in" in job.said
    assert not any(map(is_alive, workers)) and job.leftovers() == []
    assert job.main("--workers=2") == 0 and job.is_complete()


def test_a_full_disk_at_every_write(job: Job, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Wherever the space ends, in a part or where the parts are joined."""
    original = hashed_files.write_all
    for number in range(1, 1000):
        left = [number]

        def write_all(*args: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[2]))
            original(*args)

        monkeypatch.setattr(hashed_files, "write_all", write_all)
        status = job.main("--workers=1", "--records-per-part=240")
        monkeypatch.setattr(hashed_files, "write_all", original)
        if status == 0:
            break
        said = capsys.readouterr().err.splitlines()[-1]
        assert status == 74 and ": No space left on device; " in said and str(job.folder) in said
        assert job.leftovers() == []
        assert bool(job.parts) == ("parts are kept" in said)
        if not job.parts:
            assert list(job.folder.iterdir()) == []
        if number % 10 == 0:
            assert job.main("--workers=1", "--records-per-part=240") == 0 and job.is_complete()
            for path in job.folder.iterdir():
                path.unlink()
    assert number > 12 and job.is_complete()


def test_a_limit_of_the_system_in_a_worker(job: Job) -> None:
    """A real refusal to write: files must not be larger than 2 KiB."""
    process = job.start(
        "--workers=2", "--records-per-part=60", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    )
    process.join()
    assert process.exitcode == 74
    assert "part_images.bin: File too large; nothing was written" in job.said
    assert list(job.folder.iterdir()) == []


def test_other_settings_do_not_continue_a_run(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    process = job.start("--workers=1", hold=3)
    wait_for_parts(job, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert job.main("--workers=1", "--chat-template=plain") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{job.folder}/x.parts holds {len(job.parts)} parts" in said and "chat_template" in said
    assert "chat_template was vicuna_v1 then and is plain now" in said and "remove the folder" in said
    assert job.main("--workers=1") == 0 and job.is_complete()


def test_two_at_once(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    process = job.start("--workers=1", hold=1)
    wait_for_parts(job, 1)
    assert job.main("--workers=1") == 2
    assert "another process is preprocessing to" in capsys.readouterr().err
    job.release()
    process.join()
    assert process.exitcode == 0 and job.is_complete()


def test_bad_records_are_skipped_quickly_or_looked_at_again(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job.folder.parent / "bad"
    dataset = make_llava_dataset(folder, 40)
    lines = [json.dumps(record) for record in dataset.records]
    lines[17] = lines[17].replace("a/3.png", "a/late.png").replace("a/2.png", "a/late.png")
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines))
    job = Job([word for word in job.flags if "=/" not in word or "tokenizer" in word], {}, job.folder)
    flags = [f"--input={path}", f"--image-folder={dataset.image_folder}", "--workers=1"]
    assert job.main(*flags) == 1
    assert "What has been done is kept in" in capsys.readouterr().err and len(job.parts) == 4
    made = {name: (job.folder / "x.parts" / name).stat().st_mtime_ns for name in job.parts}
    # With the flag no part is made again; without it the one with a bad record is, because its image may have come.
    assert job.main(*flags) == 1
    again = {name: (job.folder / "x.parts" / name).stat().st_mtime_ns for name in job.parts}
    assert [name for name in made if made[name] != again[name]] == [job.parts[1]]
    process = job.start(*flags, "--skip-bad-records", before=kill_at(1, os, "rename"))
    process.join()
    assert process.exitcode == 0 and "continuing: 4 of 4 parts are there" in (folder.parent / "stderr").read_text()
    assert read_manifest(f"{job.folder}/x").skipped == {"missing_image": 1}
    (dataset.image_folder / "a" / "late.png").write_bytes((dataset.image_folder / "a" / "3.png").read_bytes())
    assert job.main(*flags) == 0
    assert read_manifest(f"{job.folder}/x").counts.samples == 40


def test_a_damaged_part_is_made_again(job: Job) -> None:
    process = job.start("--workers=1")
    wait_for_parts(job, 4)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    parts = [job.folder / "x.parts" / name for name in job.parts[:3]]
    data = (parts[0] / "part.bin").read_bytes()
    (parts[0] / "part.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.truncate(parts[1] / "part_images.bin", 5)
    (parts[2] / "part.manifest.json").unlink()
    assert job.main("--workers=1") == 0 and job.is_complete()
