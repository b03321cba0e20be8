"""Gather an example's results into summary.json, and print where everything is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_STAGE1_LOSSES = ("vision loss", "feature loss", "ctp loss")


def stage1_figures(metrics_file: Path) -> dict[str, Any]:
    """Held-out losses before and after stage 1, and what they mean.

    Args:
        metrics_file: written by `pretrain_haplovl.py --metrics-file`, with an evaluation before the first step and one
            after the last.

    Raises:
        ValueError: there are not two evaluations in it.
    """
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "valid vision loss" in line]
    if len(evaluations) < 2:
        raise ValueError(f"{metrics_file} has {len(evaluations)} evaluations, not one before and one after training")
    before, after = evaluations[0], evaluations[-1]
    figures: dict[str, Any] = {
        f"heldout {name}": {"before": before[f"valid {name}"], "after": after[f"valid {name}"]}
        for name in _STAGE1_LOSSES
    }
    # Paper Eq. 2: the vision loss is one minus the mean cosine.
    figures["cosine to teacher"] = {
        "before": 1.0 - before["valid vision loss"],
        "after": 1.0 - after["valid vision loss"],
    }
    figures["current token accuracy"] = {"before": before["valid ctp accuracy"], "after": after["valid ctp accuracy"]}
    return figures


def phase_seconds(folder: Path) -> dict[str, float]:
    """Seconds that each finished phase took when it ran."""
    markers = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {marker.stem: json.loads(marker.read_text(encoding="utf-8"))["seconds"] for marker in markers}


def summarize(run: Path, hf_checkpoint: Path, plot: Path) -> dict[str, Any]:
    """Everything that an example reports.

    Args:
        run: the run's folder, with `evaluation.json`, `metrics/stage1.jsonl`, `phases/` and the teachers
            that it made.
        hf_checkpoint: the exported model.
        plot: the PNG of the losses.
    """
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    scores = ("accuracy", "majority_accuracy", "count")
    reports = {name: run / "teachers" / name / "teacher.json" for name in ("vision", "language")}
    teachers = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in reports.items() if path.is_file()}
    return {
        **{name: evaluation[name] for name in scores},
        "per_type": {kind: {name: score[name] for name in scores} for kind, score in evaluation["per_type"].items()},
        "seconds": phase_seconds(run / "phases"),
        "hf_checkpoint": str(hf_checkpoint),
        "plot": str(plot),
        "stage1": stage1_figures(run / "metrics" / "stage1.jsonl"),
        "teachers": teachers,
    }


def report(summary: dict[str, Any]) -> str:
    """The summary for a person to read."""
    stage1 = summary["stage1"]
    lines = ["", "Stage 1 on held-out data, before -> after:"]
    lines += [f"  {name:<24} {values['before']:8.4f} -> {values['after']:.4f}" for name, values in stage1.items()]
    lines += ["", f"Held-out questions:        {'accuracy':>10} {'majority':>10} {'questions':>10}"]
    rows = [*summary["per_type"].items(), ("all", summary)]
    lines += [
        f"  {kind:<24} {row['accuracy']:>10.1%} {row['majority_accuracy']:>10.1%} {row['count']:>10}"
        for kind, row in rows
    ]
    seconds = summary["seconds"]
    lines += ["", "Seconds by phase:", "  " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())]
    lines += ["", f"Model (Hugging Face format): {summary['hf_checkpoint']}", f"Loss curves: {summary['plot']}"]
    return "\n".join(lines)


def main() -> None:
    args = _parse_args()
    summary = summarize(args.run, args.hf_checkpoint, args.plot)
    path = args.run / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(report(summary))
    print(f"Summary: {path}")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--hf-checkpoint", type=Path, required=True, help="the exported model")
    parser.add_argument("--plot", type=Path, required=True, help="PNG of the losses")
    return parser.parse_args()


if __name__ == "__main__":
    main()
