"""Rank program: saves a run, and resumes it with other optimizer settings and with other data; prints what happens."""

from __future__ import annotations

import sys

import torch.distributed as dist

from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.distributed.cases import config


def main(folder: str) -> None:
    for zero_stage, bf16 in ((0, False), (1, True), (2, False), (3, False)):
        here = {
            "parallel__zero_stage": zero_stage,
            "precision__bf16": bf16,
            "checkpoint__save": f"{folder}/{zero_stage}",
            "checkpoint__load": f"{folder}/{zero_stage}",
        }
        train(setup(config("full", **here, optimizer__connector_lr=5e-3)))
        changed = {
            "optimizer__connector_lr": 3e-3,
            "optimizer__weight_decay": 0.25,
            "optimizer__adam_beta2": 0.5,
            "optimizer__clip_grad": 7.0,
        }
        engine = setup(config("full", **here, **changed)).engine
        ratios = {group["name"]: group["lr_ratio"] for group in engine.optimizer.param_groups}
        decays = {group["weight_decay"] for group in engine.optimizer.param_groups}
        betas = {tuple(group["betas"]) for group in engine.optimizer.param_groups}
        if zero_stage == 0:
            (clipping,) = engine.optimizer._optimizer_step_pre_hooks.values()
            clip = clipping.max_norm
        else:
            clip = engine.optimizer.clip_grad
        print("SETTINGS", round(ratios["connector"], 9), sorted(decays), sorted(betas), clip, flush=True)
        try:
            setup(config("full", **here, data__seq_length=128))
        except ValueError as error:
            print("REFUSED", error, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
