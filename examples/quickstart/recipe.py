"""Train a small HaploVL through both stages on rendered scenes, export it, measure it and ask it a question, on a CPU.

    bash examples/quickstart.sh

makes the environment and starts this. A second call keeps every phase that is done; delete the folder to start anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common.phases import Phase
from examples.common.road import Recipe, Training, preprocessed, road
from examples.common.runner import Ending, run_recipe, start
from examples.common.small import parse_small_arguments, small_recipe

# Scripts that the data depend on.
_SOURCES = (
    *("quickstart/make_demo_data.py", "quickstart/scenes.py", "quickstart/questions.py"),
    *("common/questions.py", "common/llava_json.py"),
)
_NUMBERS, _MORE_NUMBERS = Path("examples/recipes/haplovl-debug"), Path("examples/quickstart/training.yaml")
_QUESTION = "How many shapes?"


def quickstart(args: argparse.Namespace) -> Recipe:
    """The recipe."""
    data = args.run / "data"
    images = data / "images"
    instructions, captions, texts = (preprocessed(args.run, name) for name in ("instructions", "captions", "texts"))
    return small_recipe(
        args,
        make_data=Phase(
            "data",
            ("python", "-m", "examples.quickstart.make_demo_data", "--output", data),
            inputs=[Path("examples", source) for source in _SOURCES],
            outputs=[data],
        ),
        image_folder=images,
        model=("--seq-length", "256"),
        vocab_size=768,
        vision_teacher=(
            *("--train", data / "captions.json", "--heldout", data / "heldout_captions.json", "--image-folder", images),
            *("--steps", "400", "--batch-size", "64", "--lr", "1e-3"),
        ),
        language_model=("--steps", "600", "--batch-size", "16", "--lr", "1e-3"),
        stage1=Training(
            name="stage1",
            title="stage 1",
            heldout="heldout_instructions",
            settings=(_NUMBERS / "stage1.yaml", _MORE_NUMBERS),
            flags=(
                *("--eval-interval", "50", "--data-path", "2", instructions, "1", texts),
                *("--aux-data-path", captions),
            ),
        ),
        align=Training(
            name="align",
            title="align",
            heldout="heldout_captions",
            settings=(_NUMBERS / "align.yaml", _MORE_NUMBERS),
            flags=("--eval-interval", "50", "--data-path", captions),
        ),
        full=Training(
            name="full",
            title="full",
            heldout="heldout_instructions",
            settings=(_NUMBERS / "full.yaml", _MORE_NUMBERS),
            flags=("--eval-interval", "250", "--data-path", "3", instructions, "1", captions, "1", texts),
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_small_arguments(parser, run="runs/quickstart")
    recipe = quickstart(args)
    image = recipe.image_folder / "heldout" / "000000.png"
    answer = Ending(
        ("python", "tools/generate.py", "--model", recipe.exported, "--image", image, "--prompt", _QUESTION)
        + ("--device", "cpu"),
        lead=f"\nOne question about {image}:\n  {_QUESTION}\n  -> ",
    )
    return run_recipe(args, road(recipe), [recipe.summary, answer])


if __name__ == "__main__":
    start(main)
