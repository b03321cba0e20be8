"""Rank program: builds and fills its slices of a model, and reports the most memory that this took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_haplovl.engine.processes import initialize_processes
from megatron_haplovl.training.initial_weights import fill_weights
from megatron_haplovl.training.model_setup import build_model
from tests.distributed.cases import config
from tests.distributed.test_sharded_loading import LARGE


def status_mib(key: str) -> float:
    """This process's memory, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) / 1024


def main(folder: Path) -> None:
    c = config("full", **LARGE, parallel__tensor_model_parallel_size=4)
    _, groups = initialize_processes(c)
    Path("/proc/self/clear_refs").write_text("5")  # Sets the recorded peak to the present size.
    before = status_mib("VmRSS")
    model = build_model(c, groups)
    fill_weights(model, c)
    found = {
        "grown": status_mib("VmHWM") - before,
        "slices": sum(p.numel() * p.element_size() for p in model.module.parameters()) / 2**20,
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
