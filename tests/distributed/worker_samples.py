"""Rank program: answers questions between two steps, in every layout, and takes the same steps without answering."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_haplovl.training.setup import Run, setup
from megatron_haplovl.training.step import train_step
from tests.distributed.gather import full_weights
from tests.distributed.samples import ANSWERED_AFTER, STEPS, folder_of, samples_config
from tests.distributed.topology import forget_topology
from tests.fixtures.tiny_haplo import save_training_checkpoint


class _Weights:
    """Whole weights in the form that a checkpoint is written from."""

    def __init__(self, run: Run) -> None:
        self._weights = dict(full_weights(run.model))

    def named_parameters(self):
        return self._weights.items()


def main(folder: Path, cases: Sequence[str]) -> None:
    for case in cases:
        left = folder_of(case, folder)
        trained: dict[bool, list[Any]] = {}
        for asks in (True, False):
            forget_topology()
            run = setup(samples_config(case, folder, asks=asks))
            batches = run.train_data.micro_batches() if run.steps.reads_data else iter(())
            trained[asks] = []
            for step in range(STEPS):
                result = train_step(run, step, batches)
                trained[asks].append([result.losses, result.grad_norm])
                if run.questions is not None and step + 1 == ANSWERED_AFTER:
                    answers = run.questions.answer(
                        step + 1, run.engine, run.model, run.device, run.operation.clock.enter
                    )
                    weights: Any = _Weights(run)
                    if dist.get_rank() == 0:
                        save_training_checkpoint(weights, run.config, left, step + 1)
        found = {"answers": [vars(answer) for answer in answers], "asked": trained[True], "not asked": trained[False]}
        of_all = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, found)
        if dist.get_rank() == 0:
            (left / "found.json").write_text(json.dumps(of_all))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
