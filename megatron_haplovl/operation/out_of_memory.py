"""Out of memory: what a run can still do about it, cheapest first."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megatron_haplovl.config.layout import Layout, Workload, check_layout
from megatron_haplovl.config.schema import Config


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's or the host's memory was too small."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def advice(config: Config, ranks: int) -> str:
    """What is not yet done and is possible, in the order of what it costs.

    Args:
        config: the run's settings.
        ranks: their number.
    """
    workload, alone = Workload.of(config), Layout.of(config)
    now = dataclasses.replace(alone, data=max(1, ranks // alone.ranks))

    def possible(words: str, **changed: Any) -> list[str]:
        return [] if check_layout(workload, dataclasses.replace(now, **changed)) else [words]

    steps = list[str]()
    if now.micro_batch_size > 1:
        steps += possible("--micro-batch-size 1 (the losses stay the same)", micro_batch_size=1)
    if config.precision.compile:
        steps.append("--recompute-granularity selective instead of --compile")
    else:
        slower = {"selective": "a fifth", "full": "a third"}
        for granularity in ("selective", "full")[("none", "selective", "full").index(now.recompute) :]:
            steps += possible(
                f"--recompute-granularity {granularity} ({slower[granularity]} more arithmetic)", recompute=granularity
            )
    if not config.precision.bf16:
        steps.append("--bf16")
    if now.replicas > 1:
        for stage in range(now.zero_stage + 1, 4):
            steps += possible(f"--zero-stage {stage}", zero_stage=stage)
    if now.data % 2 == 0:
        tensor, context = f"--tensor-model-parallel-size {2 * now.tensor} --sequence-parallel", 2 * now.context
        steps += possible(tensor, tensor=2 * now.tensor, data=now.data // 2, sequence_parallel=True)
        steps += possible(f"--context-parallel-size {context}", context=context, data=now.data // 2)
    if not now.offload_optimizer:
        steps += possible("--offload-optimizer cpu (slow)", offload_optimizer=True)
    if not now.offload_param:
        steps += possible("--offload-param cpu (slow)", offload_param=True)
    steps.append(f"a --seq-length below {config.data.seq_length} (other batches)")
    return "change, cheapest first: " + "; ".join(f"({number}) {step}" for number, step in enumerate(steps, 1))
