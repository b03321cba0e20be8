"""The flags of `haplovl-convert`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from megatron_haplovl.config.cli import add_settings
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import ModelConfig
from megatron_haplovl.data.chat_template import TEMPLATE_NAMES

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What --dtype stands for; None keeps each tensor's own format."""


def build_parser() -> argparse.ArgumentParser:
    """One subcommand for each direction."""
    parser = argparse.ArgumentParser(
        description="Convert Hugging Face folders to training checkpoints, and training checkpoints to the released "
        "Haplo format.",
        allow_abbrev=False,
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    _add_export(directions)
    _add_import(directions)
    return parser


def _add_export(directions: Any) -> None:
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
        choices=sorted(DTYPES),
        default="auto",
        help="number format of the exported weights (default: auto, that of the checkpoint)",
    )
    export.add_argument(
        "--verify", action="store_true", help="run both models on one batch and print the largest logit difference"
    )


def _add_import(directions: Any) -> None:
    parser = directions.add_parser(
        "import",
        help="CLIP and language model, or a released Haplo model -> training checkpoint for --pretrained-checkpoint",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", choices=sorted(MODELS), required=True, help="preset; the model flags below override parts of it"
    )
    parser.add_argument(
        "--vision-teacher",
        metavar="PATH",
        help="Hugging Face folder of a CLIPVisionModel, CLIPModel, SiglipVisionModel or SiglipModel: pre-decoder",
    )
    parser.add_argument(
        "--language-model",
        metavar="PATH",
        help="Hugging Face folder of a LlamaForCausalLM or Qwen2ForCausalLM: text embedding and post-decoder",
    )
    parser.add_argument("--haplo", metavar="PATH", help="folder in the released Haplo format: the whole model")
    parser.add_argument("--save", required=True, metavar="PATH", help="folder that receives global_step0 and `latest`")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="auto",
        help="number format of the checkpoint (default: auto, that of the folders)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run transformers and our model on one batch and print the largest differences",
    )
    parser.add_argument(
        "--allow-missing",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="our parameters that the folders may lack; regular expressions of whole names",
    )
    parser.add_argument(
        "--allow-unexpected",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="tensors of the folders that may be skipped though the model has no place for them",
    )
    add_settings(parser, ModelConfig, ("model",))
