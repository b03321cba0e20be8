"""Rank program: runs without a break, runs that stop, and runs that resume; each writes its metrics file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist

from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import config
from tests.distributed.test_resume import CASES, CASES_OF_4_RANKS, RESUMED_AFTER, TRAIN_ITERS


def main(folder: Path) -> None:
    two_ranks = os.environ["WORLD_SIZE"] == "2"
    for name, recipe, zero_stage, bf16, layout in CASES if two_ranks else CASES_OF_4_RANKS:
        for variant, flags in (
            ("whole", {}),
            ("stopped", {"checkpoint__exit_interval": RESUMED_AFTER}),
            ("resumed", {}),
        ):
            save = str(folder / name / ("whole" if variant == "whole" else "broken"))
            c = config(
                recipe,
                parallel__zero_stage=zero_stage,
                precision__bf16=bf16,
                schedule__train_iters=TRAIN_ITERS,
                schedule__lr_decay_style="cosine",
                data__num_workers=1,
                checkpoint__save=save,
                checkpoint__load=save,
                logging__log_interval=1,
                logging__metrics_file=str(folder / name / f"{variant}.jsonl"),
                **layout,
                **flags,
            )
            # DeepSpeed keeps the last engine's topology in a global.
            deepspeed.utils.groups.mpu = None
            run = setup(c)
            train(run)
            run.sinks.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
