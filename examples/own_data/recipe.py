"""From one's own conversations and images to an evaluated model in the released format, on eight GPUs.

    python -m examples.own_data.recipe --model haplovl-7b --run runs/mine \\
        --captions captions.json --instructions instructions.json --heldout heldout.json --questions questions.jsonl \\
        --image-folder images --vision-teacher clip-vit-large-patch14-336 --language-model vicuna-7b-v1.5

preprocesses, trains stage 1, captions and instructions with the numbers of examples/recipes/MODEL, exports, evaluates
and asks. Give --dry-run first: it prints every command. A second call keeps every phase that is done, and a training
that was interrupted goes on from its newest checkpoint.

haplovl-debug needs no folders: it makes a tokenizer and small teachers from the captions and the instructions.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from examples.common.road import BRIEF_TEMPLATE, Made, Recipe, Records, Training, Words, preprocessed, road
from examples.common.runner import add_runner_arguments, run_recipe, start


@dataclass(frozen=True)
class _Model:
    """What a preset is trained with."""

    captions: str
    """Name of the settings file of the training on captions."""
    instructions: str
    """Name of that of the training on instructions."""
    chat_template: str


_MODELS = {
    "haplovl-7b": _Model("align", "instructions", "vicuna_v1"),
    "haplovl-8b": _Model("captions", "instructions", "llama3"),
    "haplovl-7b-pro": _Model("captions", "instructions", "chatml"),
    "haplovl-debug": _Model("align", "full", BRIEF_TEMPLATE),
}
# Made small, these fit no other preset.
_MAKES_ITS_OWN = "haplovl-debug"
_INTERVALS = Path("examples/own_data/intervals.yaml")


def own_data(args: argparse.Namespace) -> Recipe:
    """The recipe.

    Raises:
        ValueError: a file or a folder is not there, or an argument is missing.
    """
    _check_paths(args)
    model = _MODELS[args.model]
    template = args.chat_template or model.chat_template
    vocabulary: Words = () if args.vocab_size is None else ("--vocab-size", str(args.vocab_size))
    captions, instructions = preprocessed(args.run, "captions"), preprocessed(args.run, "instructions")

    def records(name: str, file: Path, chat_template: str) -> Records:
        return Records(name, file, chat_template, inputs=(file,))

    def training(name: str, title: str, blend: Words, more: str) -> Training:
        settings = (Path("examples/recipes", args.model, f"{name}.yaml"), *args.settings)
        return Training(name, title, "heldout", settings, (*vocabulary, *blend, *shlex.split(more)))

    return Recipe(
        run=args.run,
        data=(),
        image_folder=args.image_folder,
        records=(
            records("instructions", args.instructions, template),
            records("captions", args.captions, "plain"),
            records("heldout", args.heldout, template),
        ),
        preprocessing=("--workers", str(args.workers)),
        tokenizer=args.tokenizer_model
        or args.language_model
        or Made(("--input", args.captions, args.instructions, *vocabulary), inputs=(args.captions, args.instructions)),
        vision_teacher=args.vision_teacher
        or Made(
            ("--train", args.captions, "--heldout", args.heldout, "--image-folder", args.image_folder),
            inputs=(args.captions, args.heldout),
        ),
        language_model=args.language_model
        or Made(
            ("--train", args.instructions, "--heldout", args.heldout, *vocabulary),
            inputs=(args.instructions, args.heldout),
        ),
        model=(),
        launch=tuple(shlex.split(args.launch)),
        device=args.device,
        stage1=training(
            "stage1", "stage 1", ("--data-path", instructions, "--aux-data-path", captions), args.stage1_args
        ),
        captions=training(model.captions, "captions", ("--data-path", captions), args.captions_args),
        instructions=training(
            model.instructions, "instructions", ("--data-path", instructions), args.instructions_args
        ),
        chat_template=template,
        questions=args.questions,
        evaluation=("--device", args.device),
        resumes=True,
    )


def _check_paths(args: argparse.Namespace) -> None:
    for flag in ("captions", "instructions", "heldout", "questions"):
        if not getattr(args, flag).is_file():
            raise ValueError(f"--{flag} {getattr(args, flag)}: no such file")
    for flag in ("image_folder", "vision_teacher", "language_model"):
        folder = getattr(args, flag)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{flag.replace('_', '-')} {folder}: no such folder")
    if args.tokenizer_model is not None and not args.tokenizer_model.exists():
        raise ValueError(f"--tokenizer-model {args.tokenizer_model}: no such file or folder")
    for file in args.settings:
        if not file.is_file():
            raise ValueError(f"--settings {file}: no such file")
    missing = [f"--{n.replace('_', '-')}" for n in ("vision_teacher", "language_model") if getattr(args, n) is None]
    if missing and args.model != _MAKES_ITS_OWN:
        raise ValueError(f"{args.model} needs {' and '.join(missing)}; only {_MAKES_ITS_OWN} makes its own")
    if args.language_model is None and args.vocab_size is None:
        raise ValueError("without --language-model give --vocab-size N, the rows of the one that is made")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data, in LLaVA's JSON format")
    data.add_argument("--captions", type=Path, required=True, metavar="FILE", help="images and their descriptions")
    data.add_argument("--instructions", type=Path, required=True, metavar="FILE", help="conversations")
    data.add_argument("--heldout", type=Path, required=True, metavar="FILE", help="conversations to measure losses on")
    data.add_argument("--questions", type=Path, required=True, metavar="FILE", help="see tools/evaluate.py --help")
    data.add_argument("--image-folder", type=Path, required=True, metavar="FOLDER", help="where image paths begin")
    data.add_argument("--workers", type=int, default=8, metavar="N", help="processes that preprocess (default: 8)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=sorted(_MODELS), default="haplovl-7b", help="preset (default: haplovl-7b)")
    model.add_argument("--vision-teacher", type=Path, metavar="FOLDER", help="CLIP, in Hugging Face format")
    model.add_argument("--language-model", type=Path, metavar="FOLDER", help="Llama or Qwen2, in Hugging Face format")
    model.add_argument("--tokenizer-model", type=Path, metavar="PATH", help="default: the language model's folder")
    model.add_argument("--chat-template", metavar="NAME", help="default: the one that suits the preset")
    model.add_argument("--vocab-size", type=int, metavar="N", help="rows of the embedding (default: the recipe's)")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--launch",
        default="deepspeed --num_gpus 8",
        metavar="WORDS",
        help="what starts a training script, such as 'torchrun --nproc_per_node 8 --standalone' (default: %(default)s)",
    )
    training.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    training.add_argument(
        "--settings",
        type=Path,
        nargs="*",
        default=[_INTERVALS],
        metavar="FILE",
        help=f"settings of all three trainings, which win over the recipes' settings files (default: {_INTERVALS})",
    )
    for name in ("stage1", "captions", "instructions"):
        training.add_argument(
            f"--{name}-args",
            default="",
            metavar="FLAGS",
            help=f"flags of this training, which win over all settings: --{name}-args='--train-iters 1000'",
        )
    add_runner_arguments(parser, "runs/own_data")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    recipe = own_data(args)
    return run_recipe(args, road(recipe), [recipe.summary, recipe.question])


if __name__ == "__main__":
    start(main)
