"""A store without what earlier starts of the same job have left in it.

Torchrun keeps its store over restarts. The ranks of a new start would find the addresses of ranks that have ended: a
rank that reads one before its owner has replaced it cannot connect.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistStoreError

_KEY = "haplovl/start"
_BETWEEN_LOOKS = timedelta(seconds=0.5)


def fresh_store(shared: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A part of a store that only the ranks of one start write to. Called by all of them.

    Every rank leaves a new token. The part has the name of all tokens together, so that a rank which has seen an old
    token of another rank comes to a name that nobody else has, and looks again.

    Args:
        shared: may hold anything of earlier starts, of more or fewer ranks.
        rank: of this process.
        size: number of ranks.
        timeout: how long they may take to come together.

    Raises:
        DistStoreError: they did not come together in time.
    """
    end = time.monotonic() + timeout.total_seconds()
    tokens = [f"{_KEY}/{size}/rank_{number}" for number in range(size)]
    shared.set(tokens[rank], secrets.token_hex(16))
    while True:
        shared.wait(tokens, timeout)
        name = hashlib.sha256(b" ".join(shared.multi_get(tokens))).hexdigest()
        part = PrefixStore(f"{_KEY}/{name}", shared)
        part.set(f"rank_{rank}", "here")
        try:
            part.wait([f"rank_{number}" for number in range(size)], _BETWEEN_LOOKS)
        except DistStoreError:
            if time.monotonic() >= end:
                raise
        else:
            return part
