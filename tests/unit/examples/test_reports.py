"""The plot and the summary of an example, from hand-written metrics."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from PIL import Image

from examples.common.plot_losses import plot, read_losses
from examples.common.summarize import report, stage1_figures, summarize

STAGE1: list[dict[str, Any]] = [
    {"iteration": 0, "start": 0, "run id": "", "repeated steps": 0, "set aside": None, "ending before": None},
    {"iteration": 0, "valid vision loss": 0.75, "valid feature loss": 9.0, "valid ctp loss": 6.0},
    {"iteration": 10, "loss": 5.0, "vision loss": 0.5, "feature loss": 2.0, "ctp loss": 2.5, "learning rate": 1e-3},
    {"iteration": 20, "valid vision loss": 0.25, "valid feature loss": 1.0, "valid ctp loss": 0.5},
]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run_folder(tmp_path):
    lines = [{**line, "valid ctp accuracy": 0.1 * line["iteration"] / 2} for line in STAGE1]
    for number in (0, 2):
        del lines[number]["valid ctp accuracy"]
    write_lines(tmp_path / "metrics" / "stage1.jsonl", lines)
    score = {"accuracy": 0.9, "majority_accuracy": 0.3, "count": 40, "majority_answer": "red"}
    (tmp_path / "evaluation.json").write_text(json.dumps({**score, "per_type": {"colour": score}, "seconds": 1}))
    for name in ("vision", "language"):
        write_lines(tmp_path / "teachers" / name / "teacher.json", [{"figure": name}])
    write_lines(tmp_path / "phases" / "stage1.json", [{"key": "k", "seconds": 12.5}])
    return tmp_path


def test_losses_are_read_by_name_and_iteration(tmp_path):
    series = read_losses(write_lines(tmp_path / "m.jsonl", STAGE1))
    assert series["vision loss"] == [(10, 0.5)]
    assert series["valid vision loss"] == [(0, 0.75), (20, 0.25)]
    assert "learning rate" not in series


def test_plot_is_a_png(tmp_path):
    stages = {name: read_losses(write_lines(tmp_path / "m.jsonl", STAGE1)) for name in ("stage 1", "full")}
    plot(stages, tmp_path / "new" / "losses.png")
    with Image.open(tmp_path / "new" / "losses.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300


def test_stage1_figures(run_folder):
    figures = stage1_figures(run_folder / "metrics" / "stage1.jsonl")
    assert figures["heldout ctp loss"] == {"before": 6.0, "after": 0.5}
    assert figures["cosine to teacher"] == {"before": 0.25, "after": 0.75}
    assert figures["current token accuracy"] == {"before": 0.0, "after": 1.0}


def test_stage1_figures_need_an_evaluation_before_and_after(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", STAGE1[:2])
    with pytest.raises(ValueError, match="has 1 evaluations"):
        stage1_figures(path)


def test_summary(run_folder):
    summary = summarize(run_folder, run_folder / "hf", run_folder / "losses.png")
    assert {"accuracy", "majority_accuracy", "per_type", "seconds", "hf_checkpoint", "plot", "stage1"} <= set(summary)
    assert summary["per_type"] == {"colour": {"accuracy": 0.9, "majority_accuracy": 0.3, "count": 40}}
    assert summary["seconds"] == {"stage1": 12.5}
    assert summary["teachers"] == {"vision": {"figure": "vision"}, "language": {"figure": "language"}}
    text = report(summary)
    assert "90.0%" in text
    assert str(run_folder / "hf") in text


def test_teachers_that_were_not_made_have_no_figures(run_folder):
    shutil.rmtree(run_folder / "teachers" / "vision")
    summary = summarize(run_folder, run_folder / "hf", run_folder / "losses.png")
    assert summary["teachers"] == {"language": {"figure": "language"}}
