"""One timeout for all process groups, whoever has made them."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


def set_timeouts(seconds: float) -> None:
    """Give every process group of this rank the same timeout, those that DeepSpeed has made for itself, too.

    Without tensor parallelism DeepSpeed copies the world's group, and a pipeline makes groups of neighbours; both have
    the backend's own timeout, of up to 30 minutes. Torch keeps every group in `_world.pg_map` (2.11 to 2.13).

    Args:
        seconds: after which a collective gives up.
    """
    if dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
