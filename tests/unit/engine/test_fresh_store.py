"""Ranks of a new start do not find what those of an earlier one have left in the store of torchrun."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistStoreError

from megatron_haplovl.engine.fresh_store import fresh_store

TIMEOUT = timedelta(seconds=60)


def start(port: int, size: int, name: str, seed: int) -> list[list[str]]:
    """What each rank of a start reads from all ranks, each of which has written its own name."""
    delays = random.Random(seed)
    seen: list[list[str]] = [[] for _ in range(size)]

    def run(rank: int, delay: float) -> None:
        time.sleep(delay)
        store = fresh_store(TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT), rank, size, TIMEOUT)
        if rank == 0:
            time.sleep(delay)  # Who comes early must not read what an earlier rank 0 has said.
        store.set(f"name_{rank}", f"{name} {rank}")
        seen[rank] = [store.get(f"name_{other}").decode() for other in range(size)]

    threads = [threading.Thread(target=run, args=(rank, delays.random())) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def test_each_start_sees_itself_alone() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    for number, size in enumerate((2, 2, 3, 1, 3, 2, 2)):
        expected = [f"start {number} {rank}" for rank in range(size)]
        assert start(server.port, size, f"start {number}", seed=number) == [expected] * size


def test_a_rank_that_does_not_come() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    start(server.port, 2, "earlier", seed=0)
    # The tokens of the earlier ranks are there, but nobody confirms.
    with pytest.raises(DistStoreError):
        fresh_store(server, 0, 2, timedelta(seconds=1))
