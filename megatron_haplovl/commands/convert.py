"""Convert checkpoints: Hugging Face folders -> training format -> released Haplo format, and back.

    haplovl-convert import --model haplovl-8b --vision-teacher clip-vit-large-patch14-336 \\
        --language-model Meta-Llama-3-8B --save runs/initial --verify
    haplovl-convert import --model haplovl-7b-pro --haplo Haplo-7B-Pro --save runs/released
    haplovl-convert export --load runs/finetune --save runs/haplo \\
        --tokenizer-model tokenizer.model --chat-template vicuna_v1 --verify
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers

from megatron_haplovl.checkpoint.folders import resolve_checkpoint
from megatron_haplovl.commands.convert_arguments import DTYPES, build_parser
from megatron_haplovl.config.allowed import Allowed
from megatron_haplovl.config.cli import build_config, flags_to_reach
from megatron_haplovl.config.files import read_config
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.stages import FINETUNE
from megatron_haplovl.config.validate import validate_model
from megatron_haplovl.conversion.export import export_checkpoint, training_template
from megatron_haplovl.conversion.hf_sources import MappedWeights, open_language_model, open_vision_tower
from megatron_haplovl.conversion.initial_checkpoint import ImportSummary, write_initial_checkpoint
from megatron_haplovl.conversion.released import open_released
from megatron_haplovl.conversion.verify import compare_logits
from megatron_haplovl.conversion.verify_import import compare_language_model, compare_vision_tower
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer


def run_import(args: argparse.Namespace) -> None:
    """Write the checkpoint and say where its tensors came from.

    Raises:
        ValueError: no folder or contradictory ones are given, or a folder does not fit the model.
    """
    if (args.haplo is None) == (args.vision_teacher is None and args.language_model is None):
        raise ValueError("give --haplo, or --vision-teacher and --language-model (or one of them)")
    overrides = {tuple(name.split(".")): value for name, value in vars(args).items() if name.startswith("model.")}
    overrides |= {
        ("init", name): getattr(args, name)
        for name in ("vision_teacher", "language_model")
        if getattr(args, name) is not None
    }
    config = build_config("finetune", args.model, overrides)
    model = config.model
    validate_model(model)
    allow = Allowed(args.allow_missing, args.allow_unexpected)
    sources: list[MappedWeights] = []
    if args.haplo is not None:
        released, model = open_released(args.haplo, model, allow)
        sources.append(released)
    elif model.text_embedding == "folded":
        raise ValueError("--text-embedding folded is the form of a released checkpoint (--haplo); leave it out")
    if args.vision_teacher is not None:
        sources.append(open_vision_tower(args.vision_teacher, model, allow))
    if args.language_model is not None:
        sources.append(open_language_model(args.language_model, model, allow, stage=FINETUNE))
    summary = write_initial_checkpoint(sources, dataclasses.replace(config, model=model), args.save, DTYPES[args.dtype])
    print(f"imported weights:\n{summary.table}")
    print(f"wrote {summary.checkpoint} ({summary.bytes / 1e9:.2f} GB); start a run from it with")
    flags = flags_to_reach(MODELS[args.model], model)
    print(" ".join(["  --model", args.model, *flags, "--pretrained-checkpoint", str(args.save)]), flush=True)
    if args.verify:
        _verify_import(args, summary)


def _verify_import(args: argparse.Namespace, summary: ImportSummary) -> None:
    if args.haplo is not None:
        _print_logit_difference(summary.checkpoint, args.haplo, "released")
    for folder, compare, end in (
        (args.vision_teacher, compare_vision_tower, "last layer"),
        (args.language_model, compare_language_model, "logits"),
    ):
        if folder is not None:
            found = compare(summary.checkpoint, folder)
            print(
                f"largest difference from transformers' {folder}: of a layer {max(found.layers):.3g} (largest value "
                f"{found.largest_value:.3g}, {len(found.layers)} layers), of the {end} {found.end:.3g} (largest value "
                f"{found.largest_end:.3g}), all in fp32 arithmetic"
            )


def _print_logit_difference(checkpoint: Path, folder: str | Path, other: str) -> None:
    result = compare_logits(checkpoint, folder)
    print(
        f"largest difference of a logit from the {other} model's: {result.largest_difference:.3g} "
        f"(largest logit {result.largest_logit:.3g}, {result.tokens} tokens, both in fp32 arithmetic)"
    )


def run_export(args: argparse.Namespace) -> None:
    """Write the folder and say what it holds.

    Raises:
        ValueError: see `megatron_haplovl.conversion.export.export_checkpoint`.
    """
    config = read_config(resolve_checkpoint(args.load))
    tokenizer_model = args.tokenizer_model or config.data.tokenizer_model
    if tokenizer_model is None:
        raise ValueError("the run was not given its tokenizer, so it must be given here: --tokenizer-model PATH")
    tokenizer = load_tokenizer(tokenizer_model)
    named = args.chat_template
    template = training_template(config, tokenizer) if named is None else load_chat_template(named)
    summary = export_checkpoint(args.load, args.save, tokenizer, template, DTYPES[args.dtype])
    print(
        f"exported {summary.checkpoint} to {summary.folder}: {summary.parameters:,} parameters as {summary.dtype} "
        f"({summary.bytes / 1e9:.2f} GB), {summary.rows} embedding rows",
        flush=True,
    )
    if args.verify:
        _print_logit_difference(summary.checkpoint, summary.folder, "training")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a user's error ends in one line on stderr and exit status 1."""
    args = build_parser().parse_args(argv)
    # transformers would report what a CLIP holds beside the vision tower, and bury our own report.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        (run_import if args.direction == "import" else run_export)(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
