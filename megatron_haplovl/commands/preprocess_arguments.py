"""The flags of `haplovl-preprocess`, and what they mean together."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from typing import Any

from megatron_haplovl.commands.preprocess_mixture import add_mixture_arguments
from megatron_haplovl.config.cli import add_settings, build_config
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.validate import validate_model
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.chat_template import TEMPLATE_NAMES
from megatron_haplovl.data.image_processing import DEFAULT_MAX_PIXELS, HIGHEST_MAX_PIXELS
from megatron_haplovl.data.layouts.normalise import NormaliseOptions
from megatron_haplovl.data.layouts.repairs import REPAIRS, parse_repairs
from megatron_haplovl.data.preprocessing.long_samples import LONG_SAMPLES
from megatron_haplovl.data.preprocessing.processor import ProcessorSettings
from megatron_haplovl.data.preprocessing.video import DEFAULT_NUM_FRAMES, FrameSettings

_DESCRIPTION = r"""Turn records of conversations and images into indexed files for training.

    %(prog)s --input train.json --image-folder images --output-prefix data/train \
        --tokenizer-model vicuna-7b --chat-template vicuna_v1 --workers 8

writes data/train.bin, .idx, _loss_mask.*, _images.*, _image_refs.*, _image_sizes.npy and .manifest.json, which
`--data-path data/train` reads. Records that cannot be used are listed with a reason in data/train.report.jsonl.
"""


@dataclasses.dataclass(frozen=True)
class Share:
    """One machine's share of the work."""

    index: int
    total: int

    def prefix(self, prefix: str) -> str:
        """The prefix that it is written to."""
        return f"{prefix}-{self.index:05d}-of-{self.total:05d}"


def _share(text: str) -> Share:
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None or not int(found[1]) < int(found[2]) <= 99999:
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 0 to N - 1, such as 0/8")
    return Share(int(found[1]), int(found[2]))


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """What is read, and how strictly."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        metavar="PATH",
        help="records: .json, .jsonl (.gz, .zst), .parquet, .arrow, .tar files, folders of them, or globs in quotes",
    )
    parser.add_argument(
        "--image-folder",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="folders that the records' image paths start from, searched in this order",
    )
    parser.add_argument(
        "--image-root",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="further folders into which links inside the image folders may lead",
    )
    parser.add_argument(
        "--repairs",
        type=_repairs,
        default="llava",
        metavar="NAMES",
        help=f"repairs that are allowed: llava, none, or a list such as llava,literal_mark of {', '.join(REPAIRS)} "
        "(default: %(default)s); what another one would mend is an error",
    )
    parser.add_argument(
        "--ignore-keys",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="keys that look like media and need not be read",
    )


def _repairs(text: str) -> frozenset[str]:
    try:
        return parse_repairs(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def normalise_options(args: argparse.Namespace) -> NormaliseOptions:
    """What the flags allow."""
    return NormaliseOptions(args.repairs, frozenset(args.ignore_keys))


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_input_flags(parser)
    parser.add_argument("--output-prefix", metavar="PREFIX", help="names of the files to write")
    parser.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="Hugging Face tokenizer folder, or a sentencepiece .model",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help=f"{', '.join(TEMPLATE_NAMES)}, or a .jinja file with {{%% generation %%}} marks",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes (default: %(default)s); the files do not depend on it",
    )
    parser.add_argument(
        "--skip-bad-records",
        action="store_true",
        help="leave out records that cannot be used (otherwise nothing is written if there is one)",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="larger images are taken for decompression bombs (default: %(default)s)",
    )
    videos = parser.add_argument_group("videos", "frames are taken and stored now, so that training decodes no video")
    videos.add_argument(
        "--num-frames",
        type=int,
        default=DEFAULT_NUM_FRAMES,
        metavar="N",
        help="frames of a video, evenly spread from the first to the last (default: %(default)s)",
    )
    videos.add_argument(
        "--video-frame-size",
        type=int,
        metavar="PIXELS",
        help="scale frames of video files down to this shorter side (default: as they are)",
    )
    work = parser.add_argument_group("parts", "what is finished is kept in PREFIX.parts until all of it is")
    work.add_argument(
        "--records-per-part",
        type=int,
        default=1024,
        metavar="N",
        help="what is lost at most of each worker's work when it is killed (default: %(default)s; less for videos)",
    )
    work.add_argument(
        "--part",
        type=_share,
        metavar="I/N",
        help="make the I-th of N shares, from 0, as PREFIX-0000I-of-0000N; haplovl-merge joins them",
    )
    checks = parser.add_argument_group(
        "checks against a model", "find unusable records now instead of at the start of the training"
    )
    checks.add_argument(
        "--vocab-size", type=int, metavar="N", help="report token ids that are not below this (default: from --model)"
    )
    checks.add_argument("--model", choices=sorted(MODELS), help="report samples that are too long for this model")
    checks.add_argument(
        "--seq-length", type=int, metavar="N", help="longest sample, visual tokens included (default: from --model)"
    )
    checks.add_argument(
        "--long-samples",
        choices=tuple(LONG_SAMPLES),
        default="error",
        help="what becomes of a record that is too long: "
        + "; ".join(f"{choice}, {meaning}" for choice, meaning in LONG_SAMPLES.items())
        + " (default: %(default)s)",
    )
    add_settings(parser, VisionConfig, ("model", "vision"))
    add_mixture_arguments(parser)
    return parser


def settings_from(args: argparse.Namespace) -> ProcessorSettings:
    """Combine the flags.

    Raises:
        ValueError: flags that contradict each other.
    """
    if args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    for name in ("records_per_part", "num_frames", "video_frame_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.max_image_pixels <= HIGHEST_MAX_PIXELS:
        raise ValueError(f"--max-image-pixels must be 1 to {HIGHEST_MAX_PIXELS}, got {args.max_image_pixels}")
    settings = ProcessorSettings(
        tokenizer_model=args.tokenizer_model,
        chat_template=args.chat_template,
        image_folders=tuple(args.image_folder),
        image_roots=tuple(args.image_root),
        normalise=normalise_options(args),
        max_image_pixels=args.max_image_pixels,
        vocab_size=args.vocab_size,
        frames=FrameSettings(args.num_frames, args.video_frame_size),
        long_samples=args.long_samples,
    )
    overrides: dict[tuple[str, ...], Any] = {
        tuple(name.split(".")): value for name, value in vars(args).items() if name.startswith("model.")
    }
    if args.model is None:
        if args.long_samples != "error":
            raise ValueError(f"--long-samples {args.long_samples} needs --model, which says how long is too long")
        if overrides or args.seq_length is not None:
            raise ValueError("--seq-length and the image flags check the length of samples and need --model")
        return settings
    if args.seq_length is not None:
        overrides["data", "seq_length"] = args.seq_length
    if args.vocab_size is not None:
        overrides["model", "vocab_size"] = args.vocab_size
    config = build_config("finetune", args.model, overrides)
    validate_model(config.model)
    return dataclasses.replace(
        settings, vocab_size=config.model.vocab_size, vision=config.model.vision, seq_length=config.data.seq_length
    )
