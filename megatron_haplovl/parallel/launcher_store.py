"""The store by which a launcher's ranks find one another."""

from __future__ import annotations

import os
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore


def launcher_holds_store() -> bool:
    """Whether the launcher does, as torchrun's agent; otherwise rank 0 makes one for each start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(timeout: timedelta) -> TCPStore:
    """A connection to the store at MASTER_ADDR and MASTER_PORT, whoever holds it.

    Args:
        timeout: of the connection, and of every wait for a key.

    Raises:
        RuntimeError: nobody answers in time.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
