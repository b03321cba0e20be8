"""Turn a clone of NLVR into LLaVA JSON: human sentences as true/false questions, derived captions and questions.

`dev` becomes training data (all six orders of the boxes of every example), `test` is held out. Images stay where they
are: paths are relative to the clone, which is the image folder. Files written to the output folder:

- `captions.json`, `instructions.json`: training records with images
- `texts.json`: training records whose first turn holds the caption where the image would be
- `heldout_{captions,instructions,texts}.json`: the same for `test`, one order of the boxes each
- `heldout_questions.jsonl`: one question to a line, with `question_id`, `image`, `text`, `answer`, `type`
- `boxes.json`, `heldout_boxes.json` and `boxes/*.png`: every box cut out of image 0, with a caption of its own; they
  teach the vision teacher, which sees one tile at a time (image folder: the output folder)
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from examples.common.llava_json import Record, conversation, write_json, write_json_lines
from examples.common.questions import BalancedChooser, Question
from examples.nlvr.pictures import BOX_PIXELS, BOX_STRIDE, PERMUTATIONS, Box, Example, read_examples
from examples.nlvr.questions import DESCRIBE, TYPES, all_questions, caption, contents, statement

_QUESTIONS_PER_TYPE = 3
_View = tuple[Example, int]
"""An example, and which of its six images."""


def main() -> None:
    args = _parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    train = [(example, k) for example in read_examples(args.nlvr, "dev") for k in range(len(PERMUTATIONS))]
    heldout = [(example, rng.randrange(len(PERMUTATIONS))) for example in read_examples(args.nlvr, "test")]
    for prefix, split, views in (("", "dev", train), ("heldout_", "test", heldout)):
        chooser = BalancedChooser(rng)
        write_json(args.output / f"{prefix}captions.json", [_caption_record(split, view) for view in views])
        write_json(
            args.output / f"{prefix}instructions.json",
            [_instruction_record(split, view, chooser, rng) for view in views],
        )
        write_json(args.output / f"{prefix}texts.json", [_text_record(split, view, chooser, rng) for view in views])
        print(f"{split}: {len(views)} images")
    write_json(args.output / "boxes.json", cut_boxes(args.nlvr, "dev", args.output))
    write_json(args.output / "heldout_boxes.json", cut_boxes(args.nlvr, "test", args.output))
    questions = heldout_questions("test", heldout, random.Random(args.seed))
    write_json_lines(args.output / "heldout_questions.jsonl", questions)
    print(f"{len(questions)} held-out questions")


def heldout_questions(split: str, views: Sequence[_View], rng: random.Random) -> list[Record]:
    """The human statement of every example, and one derived question of every type where there is one."""
    chooser = BalancedChooser(rng)
    records: list[Record] = []
    for example, k in views:
        for question in [statement(example), *chooser.choose(all_questions(example.permuted(k)), TYPES)]:
            records.append(
                {
                    "question_id": len(records),
                    "image": example.image(split, k),
                    "text": question.text,
                    "answer": question.answer,
                    "type": question.type,
                }
            )
    return records


def cut_boxes(clone: Path, split: str, output: Path) -> list[Record]:
    """Cut every box that shows something new out of image 0, and caption it."""
    (output / "boxes").mkdir(exist_ok=True)
    seen: set[Box] = set()
    records = []
    for example in read_examples(clone, split):
        with Image.open(clone / example.image(split, 0)) as image:
            picture = image.convert("RGB")
        for number, box in enumerate(example.permuted(0)):
            if box in seen:
                continue
            seen.add(box)
            name = f"boxes/{split}-{example.identifier}-{number}.png"
            left = number * BOX_STRIDE
            picture.crop((left, 0, left + BOX_PIXELS, BOX_PIXELS)).save(output / name)
            record_id = f"{split}-{example.identifier}-{number}-box"
            records.append(conversation(record_id, [(DESCRIBE, contents(box))], image=name))
    return records


def _caption_record(split: str, view: _View) -> Record:
    example, k = view
    name = f"{split}-{example.identifier}-{k}-caption"
    return conversation(name, [(DESCRIBE, caption(example.permuted(k)))], image=example.image(split, k))


def _instruction_record(split: str, view: _View, chooser: BalancedChooser, rng: random.Random) -> Record:
    example, k = view
    name = f"{split}-{example.identifier}-{k}-instruction"
    return conversation(name, _turns(view, chooser, rng), image=example.image(split, k))


def _text_record(split: str, view: _View, chooser: BalancedChooser, rng: random.Random) -> Record:
    example, k = view
    name = f"{split}-{example.identifier}-{k}-text"
    return conversation(name, _turns(view, chooser, rng), context=caption(example.permuted(k)))


def _turns(view: _View, chooser: BalancedChooser, rng: random.Random) -> list[tuple[str, str]]:
    """The statement and derived questions, in random order."""
    example, k = view
    questions: list[Question] = chooser.choose(all_questions(example.permuted(k)), TYPES * _QUESTIONS_PER_TYPE)
    questions.append(statement(example))
    rng.shuffle(questions)
    return [(question.text, question.answer) for question in questions]


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nlvr", type=Path, required=True, help="the `nlvr` folder of a clone (holds dev/ and test/)")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the JSON files")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the choice of questions")
    return parser.parse_args()


if __name__ == "__main__":
    main()
