"""Rank program: both losses over a vocabulary that is split unevenly, on groups of two and of four ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from tests.distributed.test_vocab_parallel_loss import (
    BOUNDS,
    DTYPES,
    TOKENS,
    VOCAB,
    gradient,
    inputs,
    result_file,
    set_chunks,
)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    set_chunks()
    for ranks, bounds in BOUNDS.items():
        group = dist.new_group(list(range(ranks)))
        if rank >= ranks:
            continue
        start, end = bounds[rank], bounds[rank + 1]
        split = {"group": group, "vocab_start": start, "vocab_size": VOCAB}
        for dtype in DTYPES:
            for tokens in TOKENS:
                x = inputs(dtype, tokens)
                weight_VL = x.weight_VL[start:end].clone().requires_grad_()
                sums = next_token_loss(x.hidden_ML, weight_VL, x.target_M, **split)
                (0.37 * sums["lm loss"]).backward()
                result = {**sums, "dhidden": gradient(x.hidden_ML), "dweight": gradient(weight_VL)}

                x = inputs(dtype, tokens)
                embedding_VL = x.weight_VL[start:end]
                sums = distillation_loss(
                    x.visual_PD, x.visual_PD.detach(), x.hidden_ML, x.target_M, embedding_VL, x.log_scale, **split
                )
                (0.37 * sums["ctp loss"] + 1.9 * sums["feature loss"]).backward()
                result |= {**sums, "dstudent": gradient(x.hidden_ML), "dlog_scale": gradient(x.log_scale)}
                torch.save(
                    {name: value.detach() for name, value in result.items()},
                    result_file(folder, ranks, rank, dtype, tokens),
                )
        x = inputs(torch.float32, 3)
        try:
            next_token_loss(x.hidden_ML, x.weight_VL[start:end], x.target_M.clamp_min(VOCAB), **split)
        except ValueError as refused:
            print(f"refused on {ranks} ranks: {refused}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
