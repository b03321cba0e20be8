"""Train a small HaploVL on NLVR through both stages and measure it on held-out pictures, on a CPU.

    bash examples/nlvr/train_nlvr.sh NLVR_PATH

makes the environment and starts this. NLVR_PATH is the folder `nlvr` of a clone of https://github.com/lil-lab/nlvr, the
one that holds dev/ and test/. A second call keeps every phase that is done; delete the folder to start anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common.phases import Phase
from examples.common.road import Recipe, Training, preprocessed, road
from examples.common.runner import run_recipe, start
from examples.common.small import parse_small_arguments, small_recipe

_NUMBERS = Path("examples/nlvr")
# Scripts that the data depend on.
_SOURCES = (
    *("nlvr/prepare_nlvr.py", "nlvr/pictures.py", "nlvr/questions.py"),
    *("common/questions.py", "common/llava_json.py"),
)


def nlvr(args: argparse.Namespace) -> Recipe:
    """The recipe.

    Raises:
        ValueError: the clone lacks one of its files.
    """
    data = args.run / "data"
    annotations = [args.nlvr / "dev" / "dev.json", args.nlvr / "test" / "test.json"]
    for path in annotations:
        if not path.is_file():
            raise ValueError(f"{path} does not exist; {args.nlvr} must be the folder `nlvr` of a clone of lil-lab/nlvr")
    boxes = ("--train", data / "boxes.json", "--heldout", data / "heldout_boxes.json", "--image-folder", data)
    instructions, captions, texts = (preprocessed(args.run, name) for name in ("instructions", "captions", "texts"))
    return small_recipe(
        args,
        make_data=Phase(
            "data",
            ("python", "-m", "examples.nlvr.prepare_nlvr", "--nlvr", args.nlvr, "--output", data),
            inputs=[*(Path("examples", source) for source in _SOURCES), *annotations],
            outputs=[data],
        ),
        image_folder=args.nlvr,
        # A picture of 400 x 100 pixels becomes four tiles in a row.
        model=("--image-aspect-ratio", "anyres", "--max-tiles", "4", "--image-newline", "--seq-length", "512"),
        vocab_size=1536,
        vision_teacher=(*boxes, "--steps", "250", "--batch-size", "64", "--lr", "1e-3"),
        language_model=("--steps", "300", "--batch-size", "8", "--lr", "1e-3"),
        stage1=Training(
            name="stage1",
            title="stage 1",
            heldout="heldout_instructions",
            settings=(_NUMBERS / "training.yaml", _NUMBERS / "stage1.yaml"),
            flags=("--data-path", "2", instructions, "1", texts, "--aux-data-path", captions),
        ),
        align=Training(
            name="align",
            title="align",
            heldout="heldout_captions",
            settings=(_NUMBERS / "training.yaml", _NUMBERS / "align.yaml"),
            flags=("--data-path", captions),
        ),
        full=Training(
            name="full",
            title="full",
            heldout="heldout_instructions",
            settings=(_NUMBERS / "training.yaml", _NUMBERS / "full.yaml"),
            flags=("--data-path", "3", instructions, "1", captions),
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nlvr", type=Path, metavar="NLVR_PATH", help="holds dev/ and test/")
    args = parse_small_arguments(parser, run="runs/nlvr")
    recipe = nlvr(args)
    return run_recipe(args, road(recipe), [recipe.summary, recipe.question])


if __name__ == "__main__":
    start(main)
