"""What every benchmark needs: median time, peak memory, the machine's name, a table and a JSON file."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
Record = Mapping[str, Any]


def median_seconds(
    fn: Callable[[], object], warmup: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median time of `fn()`, after some calls that are not counted. Waits for the GPU if there is one."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else _nothing
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        synchronize()
        started = clock()
        fn()
        synchronize()
        seconds.append(clock() - started)
    return statistics.median(seconds)


def peak_mib(fn: Callable[[], object], device: torch.device | str) -> float:
    """Most memory that `fn()` holds at one time beyond what was held before the call, in MiB.

    CUDA: what torch's allocator gave out. CPU: the growth of the process's peak resident set (Linux only). Call `fn`
    once before, so that what libraries keep for good is not counted.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # The C library keeps freed memory and would use it again without a trace, so give it back first.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Sets the recorded peak to the present size.
    before_kib = _status_kib("VmRSS")
    fn()
    return (_status_kib("VmHWM") - before_kib) / 1024


def machine(device: torch.device | str) -> dict[str, Any]:
    """When and where figures were taken: date, commit, processor or GPU, cores in use, versions."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (commit or "unknown") + (" and changes" if changed else ""),
        "machine": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
    }


def write_json(path: str | Path, records: Sequence[Record], **meta: Any) -> None:
    """Write `{**meta, "records": [...]}`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**meta, "records": list(records)}, indent=1) + "\n")


def print_table(records: Sequence[Record], columns: Sequence[str]) -> None:
    """One line per record; numbers to four significant digits, a dash where a record lacks the column."""
    rows = [list(columns), *([_cell(record.get(column)) for column in columns] for record in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _nothing() -> None:
    return None


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])
