"""Measure an exported model on a question file in the LLaVA format.

haplovl-evaluate --model runs/haplo --question-file heldout.jsonl --image-folder images \\
    --answers-file runs/answers.jsonl --json runs/evaluation.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_haplovl.evaluation.answering import Answerer, load_answerer
from megatron_haplovl.evaluation.questions import Question, load_questions
from megatron_haplovl.evaluation.scoring import normalize_answer, score_answers


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description="Measure an exported model on a question file in the LLaVA format: exact match after "
        "normalisation, per question type, beside the majority answer of that type.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="model in the released Haplo format")
    parser.add_argument(
        "--question-file",
        required=True,
        metavar="FILE",
        help=".jsonl or .json: question_id, image, text, answer and (optional) type; or LLaVA conversations",
    )
    parser.add_argument("--image-folder", metavar="FOLDER", help="where the image paths begin")
    parser.add_argument("--answers-file", required=True, metavar="FILE", help="predictions to write, one JSON per line")
    parser.add_argument("--json", metavar="FILE", help="also write the summary to this file")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions at a time (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N questions only")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def answer_all(answerer: Answerer, questions: list[Question], batch_size: int, max_new_tokens: int) -> list[str]:
    """Answer batch by batch, with a progress line on stderr."""
    answers: list[str] = []
    start = last_report = time.monotonic()
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        answers += answerer.answer(
            [question.text for question in batch],
            [question.images for question in batch],
            max_new_tokens=max_new_tokens,
        )
        now = time.monotonic()
        if now - last_report >= 5 or len(answers) == len(questions):
            rate = len(answers) / (now - start)
            remaining = (len(questions) - len(answers)) / rate
            print(
                f"answered {len(answers)}/{len(questions)} | {rate:.1f} questions/s | {remaining:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            last_report = now
    return answers


def write_predictions(path: Path, questions: list[Question], predictions: list[str]) -> None:
    """One line for each question, with the keys of LLaVA's answer files and the true answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question, prediction in zip(questions, predictions, strict=True):
            row = {
                "question_id": question.question_id,
                "prompt": question.text,
                "text": prediction,
                "answer": question.answer,
                "type": question.type,
                "correct": normalize_answer(prediction) == normalize_answer(question.answer),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def evaluate(args: argparse.Namespace) -> None:
    """Do what the flags ask for.

    Raises:
        ValueError: a bad flag, model, question file or image.
    """
    for name in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    questions = load_questions(args.question_file, args.image_folder)[: args.limit]
    answerer = load_answerer(args.model, args.device)
    start = time.monotonic()
    predictions = answer_all(answerer, questions, args.batch_size, args.max_new_tokens)
    seconds = time.monotonic() - start
    write_predictions(Path(args.answers_file), questions, predictions)
    report = score_answers(predictions, [q.answer for q in questions], [q.type for q in questions])
    print(report.table())
    if args.json:
        summary = {
            "model": str(args.model),
            "question_file": str(args.question_file),
            "answers_file": str(args.answers_file),
            "seconds": round(seconds, 3),
            **report.to_dict(),
        }
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a user's error ends in one line on stderr and exit status 1."""
    args = build_parser().parse_args(argv)
    try:
        evaluate(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
