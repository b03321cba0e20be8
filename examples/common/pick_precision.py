"""Find the number format in which this machine multiplies matrices faster, print it, and keep it in a file.

Processors with bf16 units are several times faster with it; others emulate it and are slower. The answer is kept, so
that a second run of an example makes the same choice.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

_SIZE = 1024
_REPEATS = 5


def seconds_per_product(dtype: torch.dtype) -> float:
    """Shortest of a few measured times of one matrix product."""
    a, b = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    torch.mm(a, b)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="keeps the answer: bf16 or fp32")
    args = parser.parse_args()
    faster = "bf16" if seconds_per_product(torch.bfloat16) < seconds_per_product(torch.float32) else "fp32"
    args.file.write_text(faster + "\n", encoding="utf-8")
    print(faster)


if __name__ == "__main__":
    main()
