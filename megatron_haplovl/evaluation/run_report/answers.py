"""The answers to a run's fixed questions, as HTML: each question with its pictures, each answer with its step."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_haplovl.data.image_processing import decode_image
from megatron_haplovl.data.inspection.drawing import data_uri
from megatron_haplovl.evaluation.run_report.record import RunRecord

_SIDE = 220
"""Pixels of a picture's longer side."""
_STEPS = 8
"""Steps of a run whose answers are shown."""
_QUESTIONS = 40


def answers_html(runs: Sequence[RunRecord]) -> str:
    """A block for each question; empty if no run has answers."""
    ids = list(dict.fromkeys(str(answer["question_id"]) for run in runs for answer in run.answers))
    if not ids:
        return ""
    blocks = [_question(question, runs) for question in ids[:_QUESTIONS]]
    if len(ids) > _QUESTIONS:
        blocks.append(f"<p>{len(ids) - _QUESTIONS} more questions are in the runs' samples.jsonl.</p>")
    return "<h2>Sample answers</h2>" + "".join(blocks)


def _question(question: str, runs: Sequence[RunRecord]) -> str:
    of_runs = [[a for a in run.answers if str(a["question_id"]) == question] for run in runs]
    first = next(answers[0] for answers in of_runs if answers)
    rows = []
    for run, answers in zip(runs, of_runs, strict=True):
        name = f"<td>{html.escape(run.name)}</td>" if len(runs) > 1 else ""
        for answer in _spread(answers):
            cut = "" if answer.get("has_ended", True) else ' <span class="note">(cut off)</span>'
            rows.append(f"<tr>{name}<td>{int(answer['step']):,}</td><td>{html.escape(answer['answer'])}{cut}</td></tr>")
        if len(answers) > _STEPS:
            rows.append(f'<tr>{name}<td></td><td class="note">{len(answers) - _STEPS} steps between are left out</td>')
    run_title = "<th>run</th>" if len(runs) > 1 else ""
    reference = first.get("reference")
    true_answer = "" if reference is None else f"<p>True answer: <b>{html.escape(str(reference))}</b></p>"
    return (
        f'<div class="question"><h3>{html.escape(question)}</h3>{_pictures(first)}'
        f"<pre>{html.escape(first['question'])}</pre>{true_answer}"
        f'<table class="left"><tr>{run_title}<th>step</th><th>answer</th></tr>{"".join(rows)}</table></div>'
    )


def _spread(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first, the last, and some between."""
    if len(answers) <= _STEPS:
        return answers
    return [answers[round(i * (len(answers) - 1) / (_STEPS - 1))] for i in range(_STEPS)]


def _pictures(answer: dict[str, Any]) -> str:
    paths = answer.get("images") or []
    return "".join(_picture(Path(str(path))) for path in paths) if isinstance(paths, list) else ""


def _picture(path: Path) -> str:
    try:
        picture = decode_image(path.read_bytes())
    except (OSError, ValueError) as error:
        return f'<p class="note">{html.escape(str(path))} is not shown: {html.escape(str(error))}</p>'
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "png")
    return f'<img src="{data_uri(file.getvalue(), "image/png")}" alt="{html.escape(path.name)}"> '
