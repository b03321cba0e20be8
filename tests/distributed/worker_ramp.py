"""Rank program: runs with a growing batch, each whole, stopped within the ramp, and resumed; or with another ramp."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.schema import Config
from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import SHARED_HEADS, TINY
from tests.distributed.test_ramp import LAYOUTS, STOPPED_AFTER, UNITS
from tests.distributed.topology import forget_topology

IN_STEPS = {("schedule", "train_iters"), ("schedule", "lr_warmup_iters")}


def ramp_config(unit: str, **flags: Any) -> Config:
    """A tiny run that counts samples."""
    values = {path: value for path, value in TINY.items() if path not in IN_STEPS}
    values |= {("schedule", name): value for name, value in UNITS[unit][0].items()}
    flags = {
        **{"schedule__batch_unit": unit, "schedule__lr_decay_style": "cosine", "schedule__lr_warmup_samples": 5},
        **{"data__num_workers": 1, "logging__log_interval": 1},
        **SHARED_HEADS,
        **flags,
    }
    return build_config("finetune", "haplovl-debug", values | {tuple(n.split("__")): v for n, v in flags.items()})


def main(folder: Path) -> None:
    own = {name: flags for name, (ranks, flags) in LAYOUTS.items() if ranks == int(os.environ["WORLD_SIZE"])}
    for unit in UNITS:
        for layout, flags in own.items():
            save = str(folder / f"{layout} {unit}")
            for part in ("whole", "stopped", "resumed"):
                metrics = str(folder / f"{layout} {unit} {part}.jsonl")
                more = {} if part == "whole" else {"checkpoint__save": save, "checkpoint__load": save}
                stop = STOPPED_AFTER if part == "stopped" else None
                run(ramp_config(unit, **flags, **more, logging__metrics_file=metrics, checkpoint__exit_interval=stop))
        if "one process" in own:
            load = str(folder / f"one process {unit}" / f"global_step{STOPPED_AFTER}")
            refused = []
            for ramp in ((), (1, 1, 9)):
                other = {"schedule__rampup_batch_size": ramp, "checkpoint__load": load}
                try:
                    run(ramp_config(unit, **own["one process"], **other))
                except ValueError as error:
                    refused.append(str(error))
            (folder / f"one process {unit} refused").write_text("\n".join(refused))
    dist.destroy_process_group()


def run(c: Config) -> None:
    forget_topology()
    made = setup(c)
    train(made)
    made.sinks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
