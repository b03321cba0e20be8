"""Draw a run, or several over one another, as one HTML page and as a picture.

haplovl-report runs/7b/full --html report.html --png losses.png
haplovl-report runs/7b/full runs/7b/other-rate
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_haplovl.evaluation.run_report.drawing import check_matplotlib, write_png
from megatron_haplovl.evaluation.run_report.page import report_page
from megatron_haplovl.evaluation.run_report.panels import panels_of
from megatron_haplovl.evaluation.run_report.record import METRICS_FILE, read_run

PAGE = "report.html"


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Draw a run as one HTML page: losses raw and smoothed, held-out figures, rates, throughput, "
        "memory, where the time went, answers to its questions, settings, restarts and last words. Several runs are "
        "drawn over one another, with the settings in which they differ. The page needs nothing but itself."
    )
    parser.add_argument("runs", nargs="+", metavar="SAVE", help="--save folder of a run")
    parser.add_argument(
        "--metrics",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"the runs' metrics files, one for each in the same order (default: {METRICS_FILE} in each folder)",
    )
    parser.add_argument("--html", metavar="FILE", help=f"page to write (default: {PAGE} in the first folder)")
    parser.add_argument("--png", metavar="FILE", help="picture of all charts to write")
    parser.add_argument(
        "--smooth",
        type=int,
        metavar="N",
        help="log lines that the exponential average of noisy columns reaches over (default: a fiftieth of each run)",
    )
    return parser


def report(args: argparse.Namespace) -> None:
    """Read the runs, write what is asked for, and say what could not be read.

    Raises:
        ValueError: a folder or a file cannot be used, or matplotlib is not installed.
    """
    check_matplotlib()
    if args.metrics and len(args.metrics) != len(args.runs):
        raise ValueError(f"--metrics names {len(args.metrics)} files for {len(args.runs)} runs; give one for each")
    if args.smooth is not None and args.smooth < 1:
        raise ValueError(f"--smooth must be at least 1, got {args.smooth}")
    files: list[Path | None] = [Path(file) for file in args.metrics] or [None] * len(args.runs)
    runs = [read_run(Path(folder), file) for folder, file in zip(args.runs, files, strict=True)]
    for run in runs:
        run.name = _name(run.folder, [other.folder for other in runs])
        for note in run.notes:
            print(f"{run.name}: {note}", file=sys.stderr)
    panels = panels_of(runs, args.smooth)
    page = Path(args.html) if args.html is not None else runs[0].folder / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(report_page(runs, panels), encoding="utf-8")
    print(page)
    if args.png is not None:
        write_png(panels, Path(args.png))
        print(args.png)


def _name(folder: Path, all_folders: list[Path]) -> str:
    """The end of a run's path that no other run has."""
    parts = folder.resolve().parts
    others = [other.resolve().parts for other in all_folders if other is not folder]
    for length in range(1, len(parts)):
        if all(other[-length:] != parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return str(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a user's error ends in one line on stderr and exit status 1."""
    args = build_parser().parse_args(argv)
    try:
        report(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
