"""When a checkpoint is written, what a failed one leaves behind, and when the run ends because of it."""

from __future__ import annotations

import dataclasses
import errno
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_haplovl.checkpoint import write
from megatron_haplovl.checkpoint.manifest import damaged_files
from megatron_haplovl.checkpoint.pieces import WEIGHT, Piece
from megatron_haplovl.checkpoint.state import STATE_FILE, read_state
from megatron_haplovl.config.schema import CheckpointConfig, Config
from megatron_haplovl.engine import checkpointing
from megatron_haplovl.engine.checkpointing import CheckpointWriter, Saving
from megatron_haplovl.parallel.groups import ParallelGroups

PIECES = [(Piece("a", WEIGHT, None, 0, 1, 0, 4), torch.arange(4.0))]


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A writer of one tensor, whose lock and disk a test may take away."""
    monkeypatch.setattr(checkpointing, "pieces_on_host", lambda engine, model: PIECES)
    monkeypatch.setattr(checkpointing, "_PAUSE_AT_THE_END", 0.0)

    def make(**settings: Any) -> CheckpointWriter:
        config = dataclasses.replace(Config(), checkpoint=CheckpointConfig(save=str(tmp_path), **settings))
        model: Any = SimpleNamespace(groups=ParallelGroups(), shapes={"a": torch.Size((4,))})
        engine = SimpleNamespace(bfloat16_enabled=lambda: False)
        return CheckpointWriter(engine, model, config, Saving("a run", 1000, lambda: None))

    return make


@pytest.fixture
def full_disk(monkeypatch):
    """Call it with True and False."""
    original = vars(write)["save_file"]

    def switch(is_full):
        def save_file(tensors, path, metadata):
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(write, "save_file", save_file if is_full else original)

    return switch


def train(writer, steps, first=0):
    """The steps after which a run saves."""
    saved = []
    for step in range(first + 1, steps + 1):
        if writer.is_due(step):
            saved.append(step)
            writer.save(step, "a plan")
    return saved


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("interval", "due"), [(None, []), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6])])
def test_saves_are_due_at_their_interval(writer, tmp_path, interval, due):
    assert train(writer(save_interval=interval), 7) == due
    for step in due:
        folder = tmp_path / f"global_step{step}"
        assert damaged_files(folder) == [] and read_state(folder).run_id == "a run"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_is_tried_again_soon_and_leaves_nothing(writer, tmp_path, full_disk, log_lines, asynchronous):
    saving = writer(save_interval=40, async_save=asynchronous)
    full_disk(True)
    assert train(saving, 40) == [40]
    saving._writing and saving._writing.exception()
    assert train(saving, 44, 40) == [44]
    saving.finish()
    assert names(tmp_path) == []
    full_disk(False)
    assert train(saving, 79, 44) == [48]
    saving.finish()
    assert names(tmp_path) == ["global_step48", "latest", "latest_checkpointed_iteration.txt"]
    warned = [line for line in log_lines if "the run goes on" in line]
    assert len(warned) == 2 and "saving failed, the run goes on: rank 0: [Errno 28] No space left" in warned[0]
    assert "saving failed again, the run goes on" in warned[1]
    assert train(saving, 80, 79) == [80]


@pytest.mark.parametrize("failures", [1, 3])
def test_the_run_ends_after_so_many_failed_saves(writer, tmp_path, full_disk, failures):
    saving = writer(save_interval=20, max_failed_saves=failures)
    full_disk(True)
    with pytest.raises(ValueError, match=rf"{failures} saves in a row have failed \(--max-failed-saves {failures}\)"):
        train(saving, 200)
    assert saving._at[0] == 20 * failures
    assert names(tmp_path) == []


def test_a_success_between_failures_counts_anew(writer, full_disk):
    saving = writer(save_interval=10, max_failed_saves=2)
    for first in (0, 20, 40):
        full_disk(True)
        train(saving, first + 10, first)
        full_disk(False)
        train(saving, first + 20, first + 10)


def test_the_last_checkpoint_is_tried_again_before_the_run_ends(writer, tmp_path, full_disk, monkeypatch):
    saving = writer()
    full_disk(True)
    saving.save(7, "a plan")
    monkeypatch.setattr(time, "sleep", lambda _: full_disk(False))
    saving.close()
    assert damaged_files(tmp_path / "global_step7") == []


def test_a_last_checkpoint_that_cannot_be_saved_needs_a_person(writer, full_disk):
    saving = writer()
    full_disk(True)
    saving.save(7, "a plan")
    with pytest.raises(ValueError, match="the last checkpoint could not be saved to"):
        saving.close()


@pytest.mark.parametrize("lost", ["before it is written", "while it is written"])
def test_a_run_that_has_lost_its_lock_publishes_nothing(writer, tmp_path, lost, monkeypatch):
    saving = writer(save_interval=1)
    saving.save(1, "a plan")
    left = 0 if lost == "before it is written" else 1

    def require_lock():
        nonlocal left
        if left == 0:
            raise ValueError("run.lock is that of run theirs now")
        left -= 1

    saving._saving = Saving("a run", 1000, require_lock)
    with pytest.raises(ValueError, match=r"^run.lock is that of run theirs now$"):
        saving.save(2, "a plan")
    assert (tmp_path / "latest").read_text().strip() == "global_step1" and not (tmp_path / "global_step2").exists()


def test_written_beside_the_training(writer, tmp_path):
    saving = writer(save_interval=2, async_save=True, keep_last=1, keep_every=4)
    train(saving, 10)
    saving.close()
    assert [name for name in names(tmp_path) if name.startswith("global")] == [
        "global_step10",
        "global_step4",
        "global_step8",
    ]


@pytest.mark.parametrize("ramp", [(), (4, 4, 48)])
def test_a_ramp_is_kept_and_nothing_is_written_without_one(writer, tmp_path, ramp):
    saving = writer()
    schedule = dataclasses.replace(saving._config.schedule, rampup_batch_size=ramp)
    saving._config = dataclasses.replace(saving._config, schedule=schedule)
    saving.save(7, "a plan")
    folder = tmp_path / "global_step7"
    written = json.loads((folder / STATE_FILE).read_text())
    assert ("rampup_batch_size" in written) == bool(ramp) and read_state(folder).rampup_batch_size == ramp
