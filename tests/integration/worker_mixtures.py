"""Rank program: two steps on each mixture, stage by stage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from tests.integration.mixtures import run_config


def main(folder: Path) -> None:
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        train(setup(run_config(folder, *case)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
