"""What reporting costs: the share of a run's time that is spent on columns, sinks and the terminal.

    torchrun --nproc_per_node 2 benchmarks/log_cost.py [--json PATH] [--steps N]

A run of haplovl-debug with a log line after every step, a metrics file, TensorBoard, the norm of the weights and the
zeros of the gradient. Numerator and denominator are of one run: the seconds in `Window.add` and `Window.report`,
messages between ranks included, over those in the steps. A real step is far longer, so that this is an upper bound.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, print_table, write_json
from megatron_haplovl.config.cli import build_config
from megatron_haplovl.training.loop import train
from megatron_haplovl.training.setup import setup
from megatron_haplovl.training.window import Window


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--steps", type=int, default=30, help="steps of the run (default: 30)")
    arguments = parser.parse_args()
    seconds = {"add": 0.0, "report": 0.0, "steps": 0.0}
    _timed("add", seconds)
    _timed("report", seconds)
    with tempfile.TemporaryDirectory() as folder:
        overrides: dict[tuple[str, ...], Any] = {
            ("data", "mock_data"): True,
            ("data", "num_workers"): 0,
            ("schedule", "train_iters"): arguments.steps,
            ("schedule", "global_batch_size"): 8,
            ("logging", "log_interval"): 1,
            ("logging", "log_params_norm"): True,
            ("logging", "log_num_zeros_in_grad"): True,
            ("logging", "metrics_file"): f"{folder}/metrics.jsonl",
            ("logging", "tensorboard_dir"): f"{folder}/events",
        }
        run = setup(build_config("finetune", "haplovl-debug", overrides))
        train(run)
        record = {
            "ranks": run.groups.world.size,
            "steps": arguments.steps,
            "step (ms)": 1000 * seconds["steps"] / arguments.steps,
            "add (ms)": 1000 * seconds["add"] / arguments.steps,
            "report (ms)": 1000 * seconds["report"] / arguments.steps,
            "share with a line in every step (%)": 100 * (seconds["add"] + seconds["report"]) / seconds["steps"],
            "share with a line in every 10th (%)": 100 * (seconds["add"] + seconds["report"] / 10) / seconds["steps"],
        }
        if run.groups.world.rank == 0:
            print_table([record], list(record))
            if arguments.json is not None:
                write_json(arguments.json, [record], **machine(run.device))
        run.close()


def _timed(name: str, seconds: dict[str, float]) -> None:
    """Count the seconds of one of the window's methods, and those of the steps; the first is left out."""
    original: Callable[..., None] = getattr(Window, name)

    def timed(window: Window, step: int, *arguments: Any) -> None:
        started = time.perf_counter()
        original(window, step, *arguments)
        if step > 1:
            seconds[name] += time.perf_counter() - started
            seconds["steps"] += arguments[1] if name == "add" else 0.0

    setattr(Window, name, timed)


if __name__ == "__main__":
    main()
