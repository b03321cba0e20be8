"""Rank program: saves runs in several layouts, or resumes each of them in several others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist

from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import SHARED_HEADS, config
from tests.distributed.test_topology import LAYOUTS, RECIPES, SAVED_AFTER, TRAIN_ITERS


def run(recipe: str, layout: str, metrics: Path, **flags: object) -> None:
    # DeepSpeed keeps the last engine's topology in a global.
    deepspeed.utils.groups.mpu = None
    settings = {f"parallel__{name}": value for name, value in LAYOUTS[layout][1].items()}
    c = config(
        recipe,
        **SHARED_HEADS,
        **settings,
        schedule__train_iters=TRAIN_ITERS,
        schedule__lr_decay_style="cosine",
        logging__log_interval=1,
        logging__metrics_file=str(metrics),
        **flags,
    )
    made = setup(c)
    train(made)
    made.sinks.close()


def main(folder: Path, action: str) -> None:
    own = [name for name, (ranks, _) in LAYOUTS.items() if ranks == int(os.environ["WORLD_SIZE"])]
    for recipe in RECIPES:
        for layout in own:
            if action == "save":
                save = {
                    "checkpoint__save": str(folder / f"{recipe} {layout}"),
                    "checkpoint__exit_interval": SAVED_AFTER,
                }
                run(recipe, layout, folder / f"{recipe} {layout}.jsonl", **save)
                continue
            for source in LAYOUTS:
                load = {"checkpoint__load": str(folder / f"{recipe} {source}")}
                run(recipe, layout, folder / f"{recipe} {source} -> {layout}.jsonl", **load)
    if action == "save" and own[0] == "TP 2 x PP 2":
        for recipe in RECIPES:
            run(recipe, own[0], folder / f"{recipe} undisturbed.jsonl")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
