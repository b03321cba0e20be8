"""What the examples that train everything on a CPU have in common: their own tokenizer and teachers, haplovl-debug."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
from pathlib import Path

from examples.common.phases import Phase
from examples.common.road import BRIEF_TEMPLATE, Made, Recipe, Records, Training, Words
from examples.common.runner import add_runner_arguments
from examples.common.scheduler import environment_of


def parse_small_arguments(parser: argparse.ArgumentParser, run: str) -> argparse.Namespace:
    """Parse the arguments of a small example, those of the runner included.

    Args:
        parser: with the arguments that only this example has.
        run: default of --run.
    """
    parser.add_argument("--num-processes", type=int, default=2, metavar="N", help="ranks that train (default: 2)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="number format (default: auto, the one that is faster on this machine)",
    )
    add_runner_arguments(parser, run)
    return parser.parse_args()


def precision_flags(run: Path, wanted: str, *, dry_run: bool) -> Words:
    """`--bf16` or nothing. For "auto" the faster format is measured once, and kept in the run folder.

    A dry run measures nothing: it prints the command that would, and goes on as with bf16.
    """
    kept = run / "precision"
    if wanted == "auto" and not kept.is_file():
        measure = Phase("precision", ("python", "-m", "examples.common.pick_precision", "--file", kept))
        if dry_run:
            print(f"# precision; its answer decides whether there is --bf16 below\n{measure.shell_line()}")
            return ("--bf16",)
        run.mkdir(parents=True, exist_ok=True)
        subprocess.run(measure.words, check=True, env=environment_of({}))
    if wanted == "auto":
        wanted = kept.read_text(encoding="utf-8").strip()
    return ("--bf16",) if wanted == "bf16" else ()


def small_recipe(
    args: argparse.Namespace,
    *,
    make_data: Phase,
    image_folder: Path,
    model: Words,
    vocab_size: int,
    vision_teacher: Words,
    language_model: Words,
    stage1: Training,
    align: Training,
    full: Training,
) -> Recipe:
    """A recipe with everything made from the data, and trained on the CPU.

    Args:
        args: from `parse_small_arguments`.
        make_data: writes {captions,instructions,texts}.json, the same with `heldout_` before, and
            heldout_questions.jsonl to its one output.
        image_folder: where the image paths begin.
        model: flags that say how it sees images, and the length of its sequences.
        vocab_size: upper limit of the tokenizer, and rows of the embedding.
        vision_teacher: flags of train_vision_teacher, with its captions and their image folder.
        language_model: flags of train_language_model.
        stage1: all but the number format.
        align: the same.
        full: the same.
    """
    (data,) = make_data.outputs
    precision = precision_flags(args.run, args.precision, dry_run=args.dry_run)
    texts = ("--train", data / "texts.json", "--heldout", data / "heldout_texts.json")
    vocabulary = ("--vocab-size", str(vocab_size))
    whole_model = ("--model", "haplovl-debug", *vocabulary, *model)
    return Recipe(
        run=args.run,
        data=(make_data,),
        image_folder=image_folder,
        records=(
            Records("instructions", data / "instructions.json", BRIEF_TEMPLATE),
            Records("captions", data / "captions.json", "plain"),
            Records("heldout_captions", data / "heldout_captions.json", "plain"),
            Records("texts", data / "texts.json", BRIEF_TEMPLATE),
            Records("heldout_instructions", data / "heldout_instructions.json", BRIEF_TEMPLATE),
        ),
        preprocessing=("--workers", "1", *whole_model),
        tokenizer=Made(("--input", data / "captions.json", data / "instructions.json", *vocabulary)),
        vision_teacher=Made((*vision_teacher, *precision)),
        language_model=Made((*texts, *vocabulary, *language_model, *precision)),
        model=whole_model,
        launch=("deepspeed", "--num_gpus", str(args.num_processes)),
        device="cpu",
        stage1=dataclasses.replace(stage1, flags=(*stage1.flags, *precision)),
        captions=dataclasses.replace(align, flags=(*align.flags, *precision)),
        instructions=dataclasses.replace(full, flags=(*full.flags, *precision)),
        chat_template=BRIEF_TEMPLATE,
        questions=data / "heldout_questions.jsonl",
        evaluation=("--batch-size", "64", "--max-new-tokens", "8"),
    )
