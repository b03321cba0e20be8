"""The hash of what a sample holds (`manifest.SAMPLE_HASHES`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def sample_hash(token_ids: npt.NDArray[np.int32], digests: Iterable[bytes]) -> int:
    """64 bits of what a sample holds, wherever it stands: its tokens and the SHA-256 digests of its images."""
    hashed = hashlib.sha256(token_ids.astype("<i4").tobytes())
    for digest in digests:
        hashed.update(digest)
    return int.from_bytes(hashed.digest()[:8], "little")
