"""Writing a checkpoint: into a folder aside, which gets its name when every rank's files are on the disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_haplovl.checkpoint.files import to_disk, write_text
from megatron_haplovl.checkpoint.folders import complete_checkpoints, replaced, restore_replaced, step_of, unfinished
from megatron_haplovl.checkpoint.manifest import MANIFEST, file_record, manifest_digest
from megatron_haplovl.checkpoint.pieces import Piece
from megatron_haplovl.checkpoint.space import free_bytes, gigabytes
from megatron_haplovl.checkpoint.state import CONFIG_FILE, STATE_FILE, TrainingState, read_state
from megatron_haplovl.config.files import read_json
from megatron_haplovl.config.schema import Config

_POLL_SECONDS = 0.05


def prepare(aside: Path, config: Config, state: TrainingState, needs: int) -> None:
    """Make the folder that the ranks write into, with everything in it but the tensors. Called by one rank.

    What killed runs have left unfinished in the --save folder is removed.

    Args:
        aside: see `folders.unfinished`.
        config: the run's settings.
        state: where the run stands.
        needs: bytes of the whole checkpoint, so that nothing is begun that does not fit.

    Raises:
        OSError: there is no room, or the folder cannot be written.
    """
    restore_replaced(aside.parent)
    for stale in aside.parent.glob(".global_step*.unfinished*"):
        shutil.rmtree(stale)
    free = free_bytes(aside.parent)
    if free < needs:
        raise OSError(
            errno.ENOSPC, f"a checkpoint takes {gigabytes(needs)}, and {gigabytes(free)} are free", str(aside.parent)
        )
    aside.mkdir(parents=True)
    write_settings(aside, *settings_texts(config, state))


def settings_texts(config: Config, state: TrainingState) -> tuple[str, str]:
    """What config.json and training_state.json hold."""
    settings = json.dumps({**config.to_dict(), "iteration": state.iteration}, indent=2)
    digest = hashlib.sha256(f"{settings}\n".encode()).hexdigest()
    return settings, dataclasses.replace(state, config_sha256=digest).text()


def write_settings(folder: Path, settings: str, state: str) -> None:
    """Write config.json and training_state.json; see :func:`settings_texts`."""
    write_text(folder / CONFIG_FILE, settings)
    write_text(folder / STATE_FILE, state)


def write_rank(folder: Path, rank: int, pieces: Sequence[tuple[Piece, torch.Tensor]], run_id: str) -> dict[str, Any]:
    """Write one rank's pieces (flat, on the CPU). Its JSON file appears when they are on the disk.

    Returns:
        What the JSON file holds: the file's record for the manifest, and the run's id.

    Raises:
        OSError: there is no room, or the folder cannot be written.
    """
    path = folder / f"rank-{rank:05d}.safetensors"
    path.touch()
    mode = path.stat().st_mode
    tensors = {str(i): tensor.contiguous() for i, (_, tensor) in enumerate(pieces)}
    try:
        save_file(tensors, path, metadata={"format": "pt", "run_id": run_id})
    except SafetensorError as error:  # A full disk raises it, too.
        raise OSError(f"{path}: {error}") from error
    # The library makes files that only their owner may read.
    with contextlib.suppress(OSError):  # Not every file system has modes.
        path.chmod(stat.S_IMODE(mode))
    to_disk(path)
    record = {**file_record(path), "pieces": [dataclasses.asdict(piece) for piece, _ in pieces], "run_id": run_id}
    write_text(path.with_suffix(".json"), json.dumps(record))
    return record


def mark_failed(folder: Path, rank: int) -> None:
    """Tell the rank that completes the checkpoint not to wait for this one, and give back the space of its part."""
    for written in folder.glob(f"*rank-{rank:05d}.*"):
        written.unlink(missing_ok=True)
    (folder / f"rank-{rank:05d}.failed").touch()


def complete(
    aside: Path,
    folder: Path,
    ranks: int,
    parameters: Mapping[str, torch.Size],
    dtype: torch.dtype,
    patience: float,
    run_id: str,
    require_lock: Callable[[], None] = lambda: None,
) -> None:
    """Wait for every rank's files, write the manifest, and give the folder its name. Called by one rank.

    Args:
        aside: where the ranks write.
        folder: the new name; a checkpoint that has it already is replaced once the new one is complete.
        ranks: number of ranks that write.
        parameters: shapes in the serial model.
        dtype: number format of the weights that the model computes with.
        patience: seconds to wait for a rank that has not written yet.
        run_id: of the run that writes.
        require_lock: raises if the folder is no longer this run's; called before anything that others see is changed.

    Raises:
        OSError: a rank failed, or took too long, or a part is another run's.
    """
    records = []
    end = time.monotonic() + patience
    for rank in range(ranks):
        record = aside / f"rank-{rank:05d}.json"
        while not record.is_file():
            if (aside / f"rank-{rank:05d}.failed").exists():
                raise OSError(f"rank {rank} could not write its part of {folder.name}")
            if time.monotonic() > end:
                raise OSError(
                    f"rank {rank} did not write its part of {folder.name} in {patience:.0f} s; a slow disk needs more "
                    "--distributed-timeout-minutes"
                )
            time.sleep(_POLL_SECONDS)
        records.append(read_json(record))
        _refuse_other_run(record, records[-1].pop("run_id", None), run_id)
    for rank in range(ranks):
        (aside / f"rank-{rank:05d}.json").unlink()
    write_manifest(aside, records, parameters, dtype, run_id)
    require_lock()
    give_name(aside, folder)


def write_manifest(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    parameters: Mapping[str, torch.Size],
    dtype: torch.dtype,
    run_id: str,
) -> None:
    """Write the manifest of a folder that has everything else.

    Args:
        folder: with config.json and training_state.json.
        records: of the ranks' files.
        parameters: see :func:`complete`.
        dtype: see :func:`complete`.
        run_id: of the run that writes.

    Raises:
        OSError: there is no room, or the settings beside the pieces are another run's.
    """
    # What lies beside the ranks' files is part of the checkpoint, too.
    others = [{**file_record(path), "pieces": []} for path in sorted(folder.glob("*.json"))]
    if (folder / STATE_FILE).is_file():
        state = read_state(folder)
        _refuse_other_run(folder / STATE_FILE, state.run_id, run_id)
        if state.config_sha256 != file_record(folder / CONFIG_FILE)["sha256"]:
            raise OSError(f"{folder / CONFIG_FILE} is not what this run wrote there")
    shapes = {name: list(shape) for name, shape in parameters.items()}
    manifest = {
        "run_id": run_id,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": shapes,
        "files": [*records, *others],
    }
    write_text(folder / MANIFEST, json.dumps({"sha256": manifest_digest(manifest), **manifest}))
    to_disk(folder)


def _refuse_other_run(path: Path, found: Any, run_id: str) -> None:
    if found != run_id:
        raise OSError(f"{path} was written by the run {found}, and this is the run {run_id}")


def give_name(aside: Path, folder: Path) -> None:
    """Give a complete checkpoint its name, in the place of one that has it already."""
    old = replaced(aside)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard(aside: Path) -> None:
    """Remove what a failed save has left, so that it takes no space. Called by one rank, when none writes any more."""
    restore_replaced(aside.parent)
    shutil.rmtree(aside, ignore_errors=True)


def publish(folder: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Name a complete checkpoint as the newest of its --save folder, and delete older ones. Called by one rank.

    Args:
        folder: the checkpoint.
        keep_last: checkpoints to keep (--keep-last); None keeps all.
        keep_every: those whose step it divides are kept, too (--keep-every).

    Raises:
        OSError: the folder cannot be written.
    """
    root = folder.parent
    write_text(root / "latest_checkpointed_iteration.txt", str(step_of(folder)))
    write_text(root / "latest", folder.name)
    if keep_last is not None:
        for old in complete_checkpoints(root, up_to=folder)[keep_last:]:
            if keep_every is None or step_of(old) % keep_every:
                # Renamed before it is deleted, so that a folder with a checkpoint's name is whole at any moment.
                shutil.rmtree(old.rename(unfinished(old)))
