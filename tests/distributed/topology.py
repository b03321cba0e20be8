"""What DeepSpeed keeps of one engine for the next in the same process."""

from __future__ import annotations

import deepspeed


def forget_topology() -> None:
    """Before another layout is built: DeepSpeed keeps the last engine's topology in a global."""
    deepspeed.utils.groups.mpu = None
