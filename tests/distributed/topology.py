"""What DeepSpeed keeps of one engine for the next in the same process."""

from __future__ import annotations

import deepspeed


def forget_topology() -> None:
    """Call before another layout is built, because DeepSpeed keeps the last engine's topology in a global."""
    deepspeed.utils.groups.mpu = None
