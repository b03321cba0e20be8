"""Draw every loss of every stage, in training and on held-out data, into one PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_haplovl.evaluation.run_report.metrics import read_metrics

_HELDOUT = "valid "
_COLUMNS = 3

Series = dict[str, list[tuple[int, float]]]
"""Name of a loss -> (iteration, value)."""


def read_losses(path: Path) -> Series:
    """Every value whose name ends in `loss` or `accuracy`, from a file written by --metrics-file."""
    columns = read_metrics(path).columns
    return {
        name: list(zip(column.steps, column.values, strict=True))
        for name, column in columns.items()
        if name.endswith(("loss", "accuracy"))
    }


def plot(stages: dict[str, Series], output: Path) -> None:
    """One panel per stage and value; training as a line, held-out as points on a dashed line.

    Args:
        stages: title of a stage -> its series; held-out series start with "valid ".
        output: the PNG to write.
    """
    # "loss" is the sum of the others, or the only other one.
    panels = [
        (title, name)
        for title, series in stages.items()
        for name in series
        if name != "loss" and not name.startswith(_HELDOUT)
    ]
    rows = -(-len(panels) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(4.2 * _COLUMNS, 2.9 * rows), squeeze=False)
    for axis, (title, name) in zip(axes.flat, panels, strict=False):
        series = stages[title]
        axis.plot(*zip(*series[name], strict=True), color="tab:blue", linewidth=1.2, label="training")
        if _HELDOUT + name in series:
            heldout = zip(*series[_HELDOUT + name], strict=True)
            axis.plot(*heldout, color="tab:orange", linestyle="--", marker="o", markersize=4, label="held out")
        if name.endswith("loss"):
            axis.set_yscale("log")
        axis.set_title(f"{title}: {name}", fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    args = _parse_args()
    stages = {}
    for item in args.stage:
        title, _, path = item.partition("=")
        stages[title] = read_losses(Path(path))
    plot(stages, args.output)
    print(args.output)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--stage", action="append", required=True, metavar="TITLE=FILE", help="a stage's title and its metrics file"
    )
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
