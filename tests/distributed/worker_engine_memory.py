"""Rank program: what DeepSpeed holds for a small model's weights, counted tensor by tensor."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from megatron_haplovl.config.cli import build_config
from megatron_haplovl.engine.deepspeed_config import deepspeed_config
from megatron_haplovl.engine.processes import use_no_shared_memory_collectives

WIDTH, LAYERS, FROZEN = 384, 6, 2
CASES: list[tuple[int, tuple[str, ...]]] = [
    *((zero_stage, ()) for zero_stage in (0, 1, 2, 3)),
    *((zero_stage, ("offload_optimizer",)) for zero_stage in (1, 2, 3)),
    *((3, offload) for offload in (("offload_param",), ("offload_optimizer", "offload_param"))),
]


def main(path: Path) -> None:
    use_no_shared_memory_collectives()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    records = [held(bf16, zero_stage, offload) for bf16 in (False, True) for zero_stage, offload in CASES]
    if dist.get_rank() == 0:
        path.write_text(json.dumps(records))
    dist.destroy_process_group()


def held(bf16: bool, zero_stage: int, offload: Sequence[str]) -> dict[str, Any]:
    """The most bytes that rank 0's tensors take after a backward pass, once everything has been made.

    Host and device are the same here, so what is offloaded counts, too.
    """
    earlier = tensors()  # Held, so that their addresses are not used again.
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    for layer in list(model)[:FROZEN]:
        layer.requires_grad_(False)
    config = build_config(
        "finetune",
        "haplovl-debug",
        {
            ("parallel", "zero_stage"): zero_stage,
            **{("parallel", name): "cpu" for name in offload},
            ("optimizer", "adamw_implementation"): "torch",
            ("precision", "bf16"): bf16,
            ("schedule", "global_batch_size"): 2 * dist.get_world_size(),
            ("schedule", "micro_batch_size"): 1,
        },
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        config=deepspeed_config(config, dist.get_world_size()),
        dist_init_required=False,
    )
    dtype = torch.bfloat16 if bf16 and zero_stage > 0 else torch.float32
    most = 0
    for micro_batch in range(4):
        engine.backward(engine(torch.randn(1, WIDTH, dtype=dtype)).float().square().mean())
        if micro_batch >= 2:
            # Gloo's threads may let go of a buffer a moment after its collective is done.
            most = max(most, min(bytes_beside(earlier) for _ in range(4)))
        engine.step()
    engine.destroy()
    return {"bf16": bf16, "zero_stage": zero_stage, "offload": offload, "bytes": most}


def bytes_beside(earlier: Container[int]) -> int:
    """Bytes of the storages that there are now, without those at some addresses; a moment later."""
    time.sleep(0.02)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in tensors().items() if pointer not in earlier)


def tensors() -> dict[int, torch.Tensor]:
    """A tensor for every storage that there is, by address."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type == "cpu":
            for tensor in [item] if item.grad is None else [item, item.grad]:
                found[tensor.untyped_storage().data_ptr()] = tensor
    found.pop(0, None)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
