"""How much room checkpoints take, before the first is written."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_haplovl.checkpoint.pieces import MOMENTS

# A piece's entry in the header of its file, and in the manifest, beside the parameter's name.
_ENTRY_BYTES = 200
_FILE_BYTES, _SETTINGS_BYTES = 300, 8_000


def checkpoint_bytes(
    shapes: Mapping[str, torch.Size], trained: Collection[str], dtype: torch.dtype, ranks: int, tensor_ranks: int
) -> int:
    """Bytes of one checkpoint: trained weights and their two moments in fp32, frozen weights as they are.

    Args:
        shapes: of every parameter.
        trained: names of those that are trained.
        dtype: what the model computes with.
        ranks: that write.
        tensor_ranks: tensor-parallel ranks, each of which writes a part of most tensors.
    """
    total = _SETTINGS_BYTES + ranks * _FILE_BYTES
    for name, shape in shapes.items():
        kinds, item = (1 + len(MOMENTS), torch.float32.itemsize) if name in trained else (1, dtype.itemsize)
        total += kinds * (shape.numel() * item + tensor_ranks * (_ENTRY_BYTES + len(name)))
    # ZeRO cuts a few tensors where a rank's share ends.
    return total + 3 * ranks * _ENTRY_BYTES


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints a run writes and keeps."""

    interval: int | None
    """--save-interval."""
    keep_last: int | None
    keep_every: int | None

    def most_at_once(self, first_step: int, last_step: int, there: Sequence[int]) -> int:
        """The largest number of checkpoints that lie in the folder at any moment, the one in the making included.

        Args:
            first_step: steps that are done.
            last_step: --train-iters.
            there: steps of the checkpoints that the folder holds already.
        """
        due = [] if self.interval is None else list(range(self.interval, last_step + 1, self.interval))
        if not due or due[-1] != last_step:
            due.append(last_step)
        kept, most = sorted(there), len(there)
        for step in due:
            if step <= first_step:
                continue
            most = max(most, len(kept) + 1)
            # One of the same step is replaced, and those of later steps are not looked at.
            older, later = [old for old in kept if old < step], [old for old in kept if old > step]
            if self.keep_last is not None:
                newest = older[len(older) - self.keep_last + 1 :] if self.keep_last <= len(older) else older
                every = self.keep_every
                older = [old for old in older if old in newest or (every is not None and old % every == 0)]
            kept = [*older, step, *later]
        return most


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to a folder's file system; quotas are not seen.

    A file system that knows no size, as some that are mounted from an object store, has room for everything.
    """
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total > 0 else sys.maxsize


def gigabytes(size: int) -> str:
    """A size in words."""
    for unit, bytes_ in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= bytes_:
            return f"{size / bytes_:.3g} {unit}"
    return f"{size / 1000:.3g} kB"
