"""Make the demo data set: images of scenes, captions, conversations, texts and held-out questions.

Files written to the output folder:

- `images/{train,heldout}/*.png`
- `captions.json`, `instructions.json`: training records with images
- `texts.json`: training records whose first turn holds a scene's description where the image would be
- `heldout_{captions,instructions,texts}.json`: the same for held-out scenes
- `heldout_questions.jsonl`: one question to a line, with `question_id`, `image`, `text`, `answer`, `type`

No held-out scene occurs in any training file, be it as an image or as a text.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
from collections.abc import Sequence
from pathlib import Path

from examples.common.llava_json import Record, conversation, write_json, write_json_lines
from examples.common.questions import BalancedChooser, Question
from examples.quickstart.questions import DESCRIBE, TYPES, all_questions, caption
from examples.quickstart.scenes import Scene, render, sample_scenes

_CONVERSATIONS_PER_SCENE = 2


def main() -> None:
    args = _parse_args()
    rng = random.Random(args.seed)
    heldout = sample_scenes(args.heldout_scenes, rng, held_out=True)
    train = sample_scenes(args.train_scenes, rng, held_out=False)
    text_only = sample_scenes(args.text_scenes, rng, held_out=False)

    for split, split_scenes in (("train", train), ("heldout", heldout)):
        _render_all(args.output / "images" / split, split_scenes, seed=f"{args.seed} {split}", workers=args.workers)
        print(f"{len(split_scenes)} {split} images")

    chooser = BalancedChooser(rng)
    for prefix, split, split_scenes, text_scenes in (
        ("", "train", train, text_only),
        ("heldout_", "heldout", heldout, heldout),
    ):
        captions = [_caption_record(split, i, scene) for i, scene in enumerate(split_scenes)]
        instructions = [
            _instruction_record(split, i, scene, chooser, rng)
            for i, scene in enumerate(split_scenes)
            for _ in range(_CONVERSATIONS_PER_SCENE)
        ]
        texts = [_text_record(split, i, scene, chooser, rng) for i, scene in enumerate(text_scenes)]
        write_json(args.output / f"{prefix}captions.json", captions)
        write_json(args.output / f"{prefix}instructions.json", instructions)
        write_json(args.output / f"{prefix}texts.json", texts)
        print(f"{split}: {len(captions)} captions, {len(instructions)} instructions, {len(texts)} texts")

    questions = heldout_questions(heldout, random.Random(f"{args.seed} questions"))
    write_json_lines(args.output / "heldout_questions.jsonl", questions)
    print(f"{len(questions)} held-out questions")


def image_name(split: str, number: int) -> str:
    """Path of a scene's image below `images/`."""
    return f"{split}/{number:06d}.png"


def heldout_questions(scenes: Sequence[Scene], rng: random.Random) -> list[Record]:
    """One question of every type about each scene (where it has one), answers balanced within a type."""
    chooser = BalancedChooser(rng)
    records: list[Record] = []
    for number, scene in enumerate(scenes):
        candidates = all_questions(scene)
        for question in [q for wanted in TYPES for q in chooser.choose(candidates, [wanted])]:
            records.append(
                {
                    "question_id": len(records),
                    "image": image_name("heldout", number),
                    "text": question.text,
                    "answer": question.answer,
                    "type": question.type,
                }
            )
    return records


def _caption_record(split: str, number: int, scene: Scene) -> Record:
    return conversation(f"{split}-caption-{number}", [(DESCRIBE, caption(scene))], image=image_name(split, number))


def _instruction_record(split: str, number: int, scene: Scene, chooser: BalancedChooser, rng: random.Random) -> Record:
    turns = _turns(chooser.choose(all_questions(scene), _wanted_types(rng)), rng)
    return conversation(f"{split}-instruction-{number}", turns, image=image_name(split, number))


def _text_record(split: str, number: int, scene: Scene, chooser: BalancedChooser, rng: random.Random) -> Record:
    turns = _turns(chooser.choose(all_questions(scene), _wanted_types(rng)), rng)
    return conversation(f"{split}-text-{number}", turns, context=caption(scene))


def _wanted_types(rng: random.Random) -> list[str]:
    """Types of one conversation's questions. Places are learned last and get most turns, counts soon and get fewest."""
    wanted = [*TYPES, "position"]
    if rng.random() < 0.5:
        wanted.remove("count")
    return rng.sample(wanted, len(wanted))


def _turns(questions: list[Question], rng: random.Random) -> list[tuple[str, str]]:
    rng.shuffle(questions)
    return [(question.text, question.answer) for question in questions]


def _render_all(folder: Path, scenes: Sequence[Scene], *, seed: str, workers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder / f"{number:06d}.png", scene, f"{seed} {number}") for number, scene in enumerate(scenes)]
    with multiprocessing.Pool(workers) as pool:
        pool.starmap(_render_one, jobs, chunksize=256)


def _render_one(path: Path, scene: Scene, seed: str) -> None:
    render(scene, random.Random(seed)).save(path, compress_level=1)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that receives everything")
    parser.add_argument("--train-scenes", type=int, default=16000, help="scenes with an image, for training")
    parser.add_argument("--text-scenes", type=int, default=16000, help="scenes described in text only, for training")
    parser.add_argument("--heldout-scenes", type=int, default=400, help="scenes that occur in no training file")
    parser.add_argument("--seed", type=int, default=1234, help="seed of scenes, images and questions")
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
