"""Files that change while a run reads them: the file is named, whichever it is, with and without workers."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest

from megatron_haplovl.config.schema import Config, DataConfig, ScheduleConfig
from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.loader import BatchLoader, build_loader
from megatron_haplovl.data.steady_file import ChangedFileError, SteadyFile
from tests.fixtures.small_prefix import write_small_prefix
from tests.fixtures.tiny_haplo import tiny_model

READ_IN_TRAINING = (
    *(f"{part}.{kind}" for part in (names.TOKENS, names.LOSS_MASK, names.IMAGES, names.IMAGE_REFS)
      for kind in ("bin", "idx")),
    names.IMAGE_SIZES,
)  # fmt: skip


def make_loader(prefix: str, workers: int = 0, skip: int = 0) -> BatchLoader:
    config = Config(
        model=dataclasses.replace(tiny_model(), vocab_size=128),
        data=DataConfig(seq_length=64, num_workers=workers, skip_bad_samples=skip),
        schedule=ScheduleConfig(global_batch_size=1, micro_batch_size=1),
    )
    return build_loader((prefix,), config, num_steps=100, dp_rank=0, dp_size=1)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    """Another file in its place, as `cp` writes it."""
    path.write_bytes(path.read_bytes() * 2)


@pytest.mark.parametrize("skip", [0, 3], ids=["", "skipping"])
@pytest.mark.parametrize("change", [shrink, empty, rewrite])
@pytest.mark.parametrize("suffix", READ_IN_TRAINING)
def test_every_file_that_is_read(tmp_path: Path, suffix: str, change, skip: int) -> None:
    """No sample is blamed for it, so none is skipped."""
    prefix = write_small_prefix(tmp_path)
    batches = make_loader(prefix, skip=skip).micro_batches()
    next(batches)
    change(Path(prefix + suffix))
    words = "is not the file that was opened" if change is rewrite else "is truncated"
    with pytest.raises(ChangedFileError, match=rf"^{prefix}{suffix} {words}: it has \d+ bytes, it had \d+ when"):
        next(batches)
    words = "is not the file that was written" if change is rewrite else "is truncated"
    with pytest.raises(ValueError, match=rf"^{prefix}{suffix} {words}: it has \d+ bytes"):
        make_loader(prefix)


@pytest.mark.parametrize("suffix", [".bin", "_images.idx"])
def test_in_a_worker(tmp_path: Path, suffix: str) -> None:
    """One sentence, not torch's traceback of another process."""
    prefix = write_small_prefix(tmp_path)
    batches = make_loader(prefix, workers=2).micro_batches()
    next(batches)
    empty(Path(prefix + suffix))
    with pytest.raises(ChangedFileError) as error:
        for _ in range(30):  # some were read ahead
            next(batches)
    assert str(error.value).startswith(f"{prefix}{suffix} is truncated: it has 0 bytes")


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_are_moved_away_are_read_on(tmp_path: Path, workers: int) -> None:
    prefix = write_small_prefix(tmp_path)
    batches = make_loader(prefix, workers).micro_batches()
    next(batches)
    for suffix in READ_IN_TRAINING:
        Path(prefix + suffix).unlink()
    for _ in range(30):
        next(batches)
    with pytest.raises(ValueError, match=r"small\.bin is missing"):
        make_loader(prefix)


@pytest.mark.parametrize(
    ("number", "failures", "is_read"),
    [(errno.EIO, 1, True), (errno.EIO, 2, False), (errno.ESTALE, 1, False), (errno.ENOTCONN, 1, False)],
)
def test_errors_of_the_disk(tmp_path: Path, monkeypatch, number: int, failures: int, is_read: bool) -> None:
    """An input/output error may be gone the next time; whatever stays names the file."""
    path = tmp_path / "x"
    path.write_bytes(b"abcd")
    file, pread, left = SteadyFile(path), os.pread, [failures]

    def failing(descriptor: int, length: int, start: int) -> bytes:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return pread(descriptor, length, start)

    monkeypatch.setattr(os, "pread", failing)
    if is_read:
        assert file.read(1, 2) == b"bc"
    else:
        with pytest.raises(OSError, match=rf"\[Errno {number}\] .*: '{path}'"):
            file.read(1, 2)


def test_a_file_is_closed_when_nobody_has_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcd")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        assert SteadyFile(tmp_path / "x").read(0, 4) == b"abcd"
    assert len(os.listdir("/proc/self/fd")) == before
