"""All figures about data in one run, with the machine's own limits beside them.

    python -m benchmarks.data --output benchmarks/results/data.json

Preprocessing (`benchmarks/preprocessing.py`), the loader (`benchmarks/data_loading.py`), and plans of four million
samples (`benchmarks/data_scale.py`), each of which can be run by itself. Ratios are those of one run; leave the machine
alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import data_loading, data_scale, preprocessing
from benchmarks.measure import MIB, machine, median_seconds, print_table, write_json


def limits(folder: Path) -> dict[str, float]:
    """What the machine does at best: memory copied, and a file written and read again through the page cache."""
    block = np.ones(256 * MIB, dtype=np.uint8)
    target = np.empty_like(block)
    path = folder / "copy"
    seconds = {
        "memory copy, GB/s": median_seconds(lambda: np.copyto(target, block), 1, 5),
        "file written, GB/s": median_seconds(lambda: block.tofile(path), 1, 5),
        "file read, GB/s": median_seconds(lambda: np.fromfile(path, dtype=np.uint8), 1, 5),
    }
    return {name: block.nbytes / value / 1e9 for name, value in seconds.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1500, help="records of the preprocessing benchmark")
    parser.add_argument("--samples", type=int, default=256, help="records of the loader benchmark")
    parser.add_argument(
        "--planned-samples", type=int, default=data_scale.SAMPLES, help="samples of the planned data set"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each ratio")
    parser.add_argument("--output", help="JSON file for the records")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = preprocessing.measure(folder / "preprocessing", args.records, args.repeats)
        tables: dict[str, list[dict[str, Any]]] = {
            "limits": [limits(folder)],
            "preprocessing": [{"figure": figure, "value": value} for figure, value in prepared.items()],
            "loader": data_loading.measure(args.samples, 2, args.repeats),
            "fill": data_scale.measure_fill(),
            "dealing": data_scale.measure_dealing(),
            "starts": data_scale.measure_starts(folder / "scale", args.planned_samples),
        }
    for title, records in tables.items():
        print(f"\n{title}")
        print_table(records, list(records[0]))
    if args.output:
        records = [{"table": title, **record} for title, rows in tables.items() for record in rows]
        write_json(args.output, records, **machine("cpu"))


if __name__ == "__main__":
    main()
