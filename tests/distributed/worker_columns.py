"""Rank program: runs whose log lines are compared with figures computed in another way from batches and weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import Run, setup
from tests.distributed.cases import config
from tests.distributed.columns import CASES, STEPS


def counted(batch: Batch) -> dict[str, int]:
    """What a batch holds, position by position."""
    visual = torch.zeros(batch.tokens_BS.numel(), dtype=torch.bool)
    visual[batch.patch_target_P] = True
    visual[batch.newline_target_N] = True
    used = batch.text_mask_BS | visual.view_as(batch.text_mask_BS)
    key_S = torch.arange(batch.tokens_BS.shape[1])
    seen_BSS = (key_S >= batch.kv_start_BS.unsqueeze(-1)) & (key_S < batch.kv_end_BS.unsqueeze(-1))
    return {
        "text": int(batch.text_mask_BS.sum()),
        "visual": int(visual.sum()),
        "patches": len(batch.patch_target_P),
        "labels": int((batch.labels_BS != IGNORE_INDEX).sum()),
        "positions": batch.tokens_BS.numel(),
        "pairs": int((seen_BSS & used.unsqueeze(-1)).sum()),
    }


def weights_norm(run: Run) -> float:
    """Of the whole weights, which every rank has without tensor parallelism."""
    import deepspeed

    parameters = list(run.model.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=run.config.parallel.zero_stage == 3):
        return float(torch.stack([p.detach().double().square().sum() for p in parameters]).sum().sqrt())


def main(folder: Path) -> None:
    for name, flags in CASES.items():
        recipe = str(flags.get("recipe", "full"))
        made = setup(
            config(
                recipe,
                schedule__train_iters=STEPS,
                logging__log_interval=2,
                logging__log_params_norm=True,
                logging__log_num_zeros_in_grad=True,
                logging__device_peak_tflops=0.5,
                logging__metrics_file=str(folder / f"{name}.jsonl"),
                **{key: value for key, value in flags.items() if key != "recipe"},
            )
        )
        zeros: list[int] = []
        if made.config.parallel.zero_stage == 0:
            # Without ZeRO every rank has the whole gradient when the optimizer steps.
            made.engine.basic_optimizer.register_step_pre_hook(
                lambda *_, zeros=zeros, module=made.model.module: zeros.append(
                    sum(int((p.grad == 0).sum()) for p in module.parameters() if p.grad is not None)
                )
            )
        train(made)
        made.sinks.close()
        batches = made.train_data.micro_batches(0)
        mine = [counted(batch) for batch in batches]
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, mine)
        norm = weights_norm(made)
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps({"batches": everyone, "norm": norm, "zeros": zeros}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
