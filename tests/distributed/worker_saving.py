"""Rank program: runs that keep some checkpoints, save beside the training, meet a full disk, or find damage."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_haplovl.checkpoint import write
from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import config


def run(folder: Path, name: str, save: str, **flags: Any) -> None:
    made = setup(
        config(
            "full",
            checkpoint__save=str(folder / save),
            checkpoint__save_interval=1,
            logging__log_interval=1,
            logging__metrics_file=str(folder / f"{name}.jsonl"),
            **{"schedule__train_iters": 6, **flags},
        )
    )
    train(made)
    made.sinks.close()


def full_disk_at(step: int, full_rank: int) -> Any:
    """Make this rank unable to write this step's checkpoint: the system refuses large files while it saves."""
    write_rank = write.write_rank

    def write_part(folder: Path, rank: int, pieces: Any, run_id: str) -> Any:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == full_rank and folder.name == f".global_step{step}.unfinished":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return write_rank(folder, rank, pieces, run_id)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    write.write_rank = write_part
    return write_rank


def main(folder: Path) -> None:
    run(folder, "whole", "whole", checkpoint__keep_last=2)
    run(folder, "beside", "beside", checkpoint__async_save=True, checkpoint__exit_interval=4)
    run(folder, "beside resumed", "beside", checkpoint__load=str(folder / "beside"))
    for rank, (name, flags) in enumerate(
        (("full disk", {}), ("full disk beside", {"checkpoint__async_save": True})),
    ):
        original = full_disk_at(4, rank)
        run(folder, name, name, **flags)
        write.write_rank = original
    # This run trains other parts of the model than before.
    other = {"recipe__freeze_post_decoder": True, "run__seed": 17}
    weights = {"checkpoint__load": str(folder / "beside"), "checkpoint__finetune": True}
    run(folder, "finetune", "finetuned", **other, **weights)
    run(folder, "pretrained", "pretrained", **other, init__pretrained_checkpoint=str(folder / "beside"))
    dist.barrier()
    if dist.get_rank() == 0:
        damaged = folder / "whole" / "global_step6" / "rank-00001.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    found = {}
    # The last save fails, and --save is a file.
    original = full_disk_at(6, 1)
    try:
        run(folder, "never saved", "never saved")
    except ValueError as error:
        found["never saved"] = str(error)
    write.write_rank = original
    if dist.get_rank() == 0:
        (folder / "file").touch()
    dist.barrier()
    try:
        run(folder, "no folder", "file")
    except ValueError as error:
        found["no folder"] = str(error)
    refused: tuple[tuple[str, dict[str, Any]], ...] = (
        ("other parts", {"recipe__freeze_post_decoder": True, "checkpoint__load": str(folder / "beside")}),
        ("damaged", {"checkpoint__load": str(folder / "whole")}),
        ("damaged weights", {"init__pretrained_checkpoint": str(folder / "whole")}),
    )
    for name, flags in refused:
        try:
            run(folder, name, "other", **flags)
        except ValueError as error:
            found[name] = str(error)
    fallback: dict[str, Any] = {"checkpoint__load": str(folder / "whole"), "checkpoint__allow_fallback": True}
    run(folder, "fallback", "other", **fallback)
    run(folder, "fallback weights", "yet another", **fallback, checkpoint__finetune=True)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "beside" / "latest").unlink()
    dist.barrier()
    # Only the first rank is given a folder that exists.
    elsewhere = folder / ("beside" if dist.get_rank() == 0 else "nowhere") / "global_step4"
    run(folder, "seen by one", "yet another", checkpoint__load=str(elsewhere))
    run(folder, "one step", "beside", checkpoint__load=str(folder / "beside" / "global_step4"))
    run(folder, "without latest", "yet another", checkpoint__load=str(folder / "beside"), schedule__train_iters=7)
    # Goes back to step 2 and keeps two from there on, beside those of steps 3 to 6.
    back = {"checkpoint__load": str(folder / "full disk" / "global_step2"), "checkpoint__keep_last": 2}
    run(folder, "back", "full disk", **back, schedule__train_iters=4)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
