#!/usr/bin/env python
"""Convert checkpoints between the training format and the released Haplo format.

    python tools/convert_checkpoint.py export --load runs/finetune --save runs/haplo \\
        --tokenizer-model tokenizer.model --chat-template vicuna_v1 --verify
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from megatron_haplovl.checkpoint.weights import read_config, resolve_checkpoint
from megatron_haplovl.data.chat_template import TEMPLATE_NAMES, load_chat_template
from megatron_haplovl.data.tokenizer import load_tokenizer
from megatron_haplovl.hf.export import export_checkpoint, training_template
from megatron_haplovl.hf.verify import compare_logits

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    """One subcommand for each direction."""
    parser = argparse.ArgumentParser(
        description="Convert checkpoints between the training format and the released Haplo format.",
        allow_abbrev=False,
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    export = directions.add_parser(
        "export",
        help="training checkpoint (stage 2) -> Hugging Face folder in the released format",
        allow_abbrev=False,
    )
    export.add_argument(
        "--load", required=True, metavar="PATH", help="--save folder of a training run, or one global_stepN in it"
    )
    export.add_argument("--save", required=True, metavar="PATH", help="folder to write")
    export.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="tokenizer of the training data: Hugging Face folder or sentencepiece .model (default: the run's own "
        "--tokenizer-model)",
    )
    export.add_argument(
        "--chat-template",
        metavar="NAME",
        help=f"chat template of the training data: {', '.join(TEMPLATE_NAMES)}, or a .jinja file (default: the one "
        "that the manifests of the run's data name)",
    )
    export.add_argument(
        "--dtype",
        choices=sorted(_DTYPES),
        default="auto",
        help="number format of the exported weights (default: auto, that of the checkpoint)",
    )
    export.add_argument(
        "--verify", action="store_true", help="run both models on one batch and print the largest logit difference"
    )
    export.set_defaults(run=run_export)
    return parser


def run_export(args: argparse.Namespace) -> None:
    """Write the folder and say what it holds.

    Raises:
        ValueError: see `megatron_haplovl.hf.export.export_checkpoint`.
    """
    config = read_config(resolve_checkpoint(args.load))
    tokenizer_model = args.tokenizer_model or config.data.tokenizer_model
    if tokenizer_model is None:
        raise ValueError("the run was not given its tokenizer, so it must be given here: --tokenizer-model PATH")
    tokenizer = load_tokenizer(tokenizer_model)
    named = args.chat_template
    template = training_template(config, tokenizer) if named is None else load_chat_template(named)
    summary = export_checkpoint(args.load, args.save, tokenizer, template, _DTYPES[args.dtype])
    print(
        f"exported {summary.checkpoint} to {summary.folder}: {summary.parameters:,} parameters as {summary.dtype} "
        f"({summary.bytes / 1e9:.2f} GB), {summary.rows} embedding rows",
        flush=True,
    )
    if args.verify:
        result = compare_logits(summary.checkpoint, summary.folder)
        print(
            f"largest difference of a logit from the training model's: {result.largest_difference:.3g} "
            f"(largest logit {result.largest_logit:.3g}, {result.tokens} tokens, both in fp32 arithmetic)"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a user's error ends in one line on stderr and exit status 1."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
