"""Ask an exported model the first question of a question file, and print both."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_haplovl.evaluation.answering import load_answerer
from megatron_haplovl.evaluation.questions import load_questions

_MAX_NEW_TOKENS = 128


def main() -> None:
    args = _parse_args()
    question = load_questions(args.question_file, args.image_folder)[0]
    answerer = load_answerer(args.model, args.device)
    (answer,) = answerer.answer([question.text], [question.images], max_new_tokens=_MAX_NEW_TOKENS)
    where = " and ".join(str(image) for image in question.images) or "no image"
    print(f"One question about {where}:\n  {question.text}\n  -> {answer}")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model in the released Haplo format")
    parser.add_argument("--question-file", type=Path, required=True, help="questions, as tools/evaluate.py reads them")
    parser.add_argument("--image-folder", type=Path, required=True, help="where the image paths begin")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
