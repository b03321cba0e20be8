"""Train a small HaploVL through both stages on rendered scenes, export it, measure it and ask it a question, on a CPU.

    bash examples/quickstart.sh

makes the environment and starts this. A second call keeps every phase that is done; delete the folder to start anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common.phases import Phase
from examples.common.road import Recipe, preprocessed, road
from examples.common.runner import Ending, run_recipe, start
from examples.common.small import parse_small_arguments, small_recipe

_QUESTION = "How many shapes?"

# The numbers below were tuned on two cores for accuracy within ten minutes; they are no recipe for a large model.
_TRAINING = (
    *("--init-std", "0.07", "--micro-batch-size", "4", "--global-batch-size", "8", "--num-workers", "0"),
    *("--zero-stage", "1", "--log-interval", "10", "--eval-iters", "10"),
)
_STAGE1 = ("--train-iters", "300", "--lr", "1e-3", "--lr-warmup-iters", "20", "--eval-interval", "50")
_ALIGN = ("--train-iters", "150", "--lr", "3e-3", "--lr-warmup-iters", "10", "--eval-interval", "50")
_FULL = ("--train-iters", "2200", "--lr", "1.5e-3", "--lr-warmup-iters", "30", "--eval-interval", "250")


def quickstart(args: argparse.Namespace) -> Recipe:
    """The recipe."""
    data = args.run / "data"
    images = data / "images"
    instructions, captions, texts = (preprocessed(args.run, name) for name in ("instructions", "captions", "texts"))
    sources = ("examples/quickstart", "examples/common/questions.py", "examples/common/llava_json.py")
    return small_recipe(
        args,
        make_data=Phase(
            "data",
            ("python", "-m", "examples.quickstart.make_demo_data", "--output", data),
            inputs=[Path(source) for source in sources],
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
        stage1=(*_TRAINING, *_STAGE1, "--data-path", "2", instructions, "1", texts, "--aux-data-path", captions),
        align=(*_TRAINING, *_ALIGN, "--data-path", captions),
        full=(*_TRAINING, *_FULL, "--data-path", "3", instructions, "1", captions, "1", texts),
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
