"""Rank program: trains on several sources in one layout and leaves what was logged of each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.distributed.sources import sources_config


def main(folder: Path, skip_bad_samples: int, case: str) -> None:
    train(setup(sources_config(case, folder, skip_bad_samples)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
