"""Rank program: a run without a break, one that stops, and one that resumes; each writes its metrics file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import config
from tests.distributed.test_resume import CASES, CASES_OF_4_RANKS, RESUMED_AFTER, TRAIN_ITERS
from tests.distributed.topology import forget_topology


def main(folder: Path, case: str) -> None:
    ((name, recipe, zero_stage, bf16, layout),) = (c for c in (*CASES, *CASES_OF_4_RANKS) if c[0] == case)
    for variant in ("whole", "stopped", "resumed"):
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
            checkpoint__exit_interval=RESUMED_AFTER if variant == "stopped" else None,
        )
        forget_topology()
        run = setup(c)
        train(run)
        run.sinks.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
