"""Rank program: a training run with a fault in it.

    HAPLOVL_FAULT=NAME@STEP:RANK torchrun ... tests/faults/faulty_run.py finetune --model haplovl-debug ...

NAME is one of `faults.FAULTS`; there may be several faults, with spaces between them. Only the first start has them:
after a restart of torchrun, or where the file of HAPLOVL_FAULT_DONE exists, there are none. With HAPLOVL_FAULT_AGAIN
set, every restart has them, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_haplovl import finetune, pretrain
from tests.faults.faults import FAULTS


def main() -> None:
    stage = next(word for word in sys.argv if word in ("pretrain", "finetune"))
    sys.argv.remove(stage)
    faults = os.environ.get("HAPLOVL_FAULT", "").split()
    done = Path(os.environ.get("HAPLOVL_FAULT_DONE", "/nonexistent"))
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not (is_restart and "HAPLOVL_FAULT_AGAIN" not in os.environ) and not done.exists():
        for fault in faults:
            name, _, place = fault.partition("@")
            step, _, rank = place.partition(":")
            FAULTS[name](int(step), int(rank))
    {"pretrain": pretrain, "finetune": finetune}[stage].main()


if __name__ == "__main__":
    main()
