"""Writing a checkpoint: into a folder aside, which gets its name when every rank's files are on the disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_haplovl.checkpoint.files import to_disk, write_text
from megatron_haplovl.checkpoint.folders import STATE_FILE, complete_checkpoints, replaced, restore_replaced, unfinished
from megatron_haplovl.checkpoint.manifest import MANIFEST, file_record, manifest_digest
from megatron_haplovl.checkpoint.pieces import Piece
from megatron_haplovl.config.files import read_json
from megatron_haplovl.config.schema import Config

_POLL_SECONDS = 0.05


def prepare(
    aside: Path, config: Config, iteration: int, plan_key: str, more_state: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Make the folder that the ranks write into, with everything in it but the tensors. Called by one rank.

    What killed runs have left unfinished in the --save folder is removed.

    Args:
        aside: see `folders.unfinished`.
        config: the run's settings.
        iteration: optimizer steps done.
        plan_key: the training data's `BatchLoader.plan_key`; with the iteration, the position in the data.
        more_state: what else a resumed run must know.

    Raises:
        OSError: there is no room, or the folder cannot be written.
    """
    restore_replaced(aside.parent)
    for stale in aside.parent.glob(".global_step*.unfinished*"):
        shutil.rmtree(stale)
    aside.mkdir(parents=True)
    state = {"global_batch_size": config.schedule.global_batch_size, "plan_key": plan_key, **more_state}
    write_text(aside / "config.json", json.dumps({**config.to_dict(), "iteration": iteration}, indent=2))
    write_text(aside / STATE_FILE, json.dumps({"iteration": iteration, **state}))


def write_rank(folder: Path, rank: int, pieces: Sequence[tuple[Piece, torch.Tensor]]) -> None:
    """Write one rank's pieces (flat, on the CPU). Its JSON file appears when they are on the disk.

    Raises:
        OSError: there is no room, or the folder cannot be written.
    """
    path = folder / f"rank-{rank:05d}.safetensors"
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({str(i): tensor.contiguous() for i, (_, tensor) in enumerate(pieces)}, path)
    except SafetensorError as error:  # A full disk raises it, too.
        raise OSError(f"{path}: {error}") from error
    # The library makes files that only their owner may read.
    with contextlib.suppress(OSError):  # Not every file system has modes.
        path.chmod(stat.S_IMODE(mode))
    to_disk(path)
    record = {**file_record(path), "pieces": [dataclasses.asdict(piece) for piece, _ in pieces]}
    write_text(path.with_suffix(".json"), json.dumps(record))


def mark_failed(folder: Path, rank: int) -> None:
    """Tell the rank that completes the checkpoint not to wait for this one."""
    (folder / f"rank-{rank:05d}.failed").touch()


def complete(
    aside: Path, folder: Path, ranks: int, parameters: Mapping[str, torch.Size], dtype: torch.dtype, patience: float
) -> None:
    """Wait for every rank's files, write the manifest, and give the folder its name. Called by one rank.

    Args:
        aside: where the ranks write.
        folder: the new name; a checkpoint that has it already is replaced once the new one is complete.
        ranks: number of ranks that write.
        parameters: shapes in the serial model.
        dtype: number format of the weights that the model computes with.
        patience: seconds to wait for a rank that has not written yet.

    Raises:
        OSError: a rank failed, or took too long.
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
    for rank in range(ranks):
        (aside / f"rank-{rank:05d}.json").unlink()
    # What lies beside the ranks' files is part of the checkpoint, too.
    others = sorted(path for path in aside.iterdir() if path.suffix == ".json")
    records += [{**file_record(path), "pieces": []} for path in others]
    shapes = {name: list(shape) for name, shape in parameters.items()}
    manifest = {"dtype": str(dtype).removeprefix("torch."), "parameters": shapes, "files": records}
    write_text(aside / MANIFEST, json.dumps({"sha256": manifest_digest(manifest), **manifest}))
    to_disk(aside)
    old = replaced(aside)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish(folder: Path, keep_last: int | None) -> None:
    """Name a complete checkpoint as the newest of its --save folder, and delete older ones. Called by one rank.

    Args:
        folder: the checkpoint.
        keep_last: checkpoints to keep (--keep-last); None keeps all.

    Raises:
        OSError: the folder cannot be written.
    """
    root = folder.parent
    write_text(root / "latest_checkpointed_iteration.txt", folder.name.removeprefix("global_step"))
    write_text(root / "latest", folder.name)
    if keep_last is not None:
        for old in complete_checkpoints(root, up_to=folder)[keep_last:]:
            # Renamed before it is deleted, so that a folder with a checkpoint's name is whole at any moment.
            shutil.rmtree(old.rename(unfinished(old)))
