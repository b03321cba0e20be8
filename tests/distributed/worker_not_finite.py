"""Rank program: a weight that is not finite, somewhere; reports what the step raised and which weights it changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_haplovl.training.setup import setup
from megatron_haplovl.training.step import train_step
from tests.distributed.cases import config
from tests.distributed.topology import forget_topology


def main(folder: Path) -> None:
    found = {}
    for pipeline in (1, 2):
        for zero_stage, bf16 in ((0, False), (1, False), (1, True)):
            forget_topology()
            layout = {"parallel__pipeline_model_parallel_size": pipeline, "parallel__zero_stage": zero_stage}
            run = setup(config("full", **layout, precision__bf16=bf16))
            parameters = dict(run.model.module.named_parameters())
            with torch.no_grad():
                if "lm_head.weight" in parameters:
                    parameters["lm_head.weight"].fill_(float("nan"))
            before = {name: parameter.clone() for name, parameter in parameters.items()}
            try:
                train_step(run, 0, run.train_data.micro_batches())
                message = "nothing was raised"
            except FloatingPointError as error:
                message = str(error)
            changed = [n for n, p in parameters.items() if n != "lm_head.weight" and not torch.equal(p, before[n])]
            found[f"pipeline {pipeline}, ZeRO {zero_stage}, bf16 {bf16}"] = (message, changed)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
