"""Rank program: runs that die between two checkpoints and go on from local copies; each rank is a "machine"."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_haplovl.training import loop
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import config
from tests.distributed.topology import forget_topology

DIES_AFTER = 3


def run(folder: Path, name: str, save: str, dies: bool = False, **flags: Any) -> None:
    forget_topology()
    made = setup(
        config(
            "full",
            schedule__train_iters=6,
            checkpoint__save=str(folder / save),
            checkpoint__load=str(folder / save),
            checkpoint__save_interval=2,
            checkpoint__non_persistent_save_interval=1,
            checkpoint__non_persistent_local_ckpt_dir=str(folder / f"machine{dist_rank()}"),
            logging__log_interval=1,
            logging__metrics_file=str(folder / f"{name}.jsonl"),
            **flags,
        )
    )
    original: Any = vars(loop)["train_step"]

    def train_step(run: Any, step: int, micro_batches: Any) -> Any:
        if step == DIES_AFTER:
            raise RuntimeError("the machine is gone")
        return original(run, step, micro_batches)

    if dies:
        vars(loop)["train_step"] = train_step
    try:
        loop.train(made)
    except RuntimeError as error:
        assert str(error) == "the machine is gone"
    vars(loop)["train_step"] = original
    made.sinks.close()
    dist.barrier()


def dist_rank() -> int:
    return int(os.environ["RANK"])


def main(folder: Path) -> None:
    run(folder, "whole", "whole")
    for name in ("resumed", "lost", "layout"):
        run(folder, f"{name} before", name, dies=True)
        if name == "lost" and dist_rank() == 1:
            for copies in (folder / "machine1").glob(f"{name}-*"):
                shutil.rmtree(copies)
        flags: dict[str, Any] = {"parallel__tensor_model_parallel_size": 2} if name == "layout" else {}
        run(folder, name, name, **flags)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
