"""`haplovl-preprocess`: records and images -> indexed files for training, and a report of what cannot be used."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from megatron_haplovl.commands.preprocess_mixture import add_mixture_arguments, check_words, preprocess_mixture
from megatron_haplovl.config.cli import add_settings, build_config
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.validate import validate_model
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.chat_template import TEMPLATE_NAMES
from megatron_haplovl.data.image_processing import DEFAULT_MAX_PIXELS, HIGHEST_MAX_PIXELS
from megatron_haplovl.data.manifest import REPORT_SUFFIX, Manifest
from megatron_haplovl.data.preprocess import BadRecord, PrefixWriter, ProcessorSettings, RecordProcessor
from megatron_haplovl.data.preprocess_workers import process_in_order
from megatron_haplovl.data.records import read_records

_DESCRIPTION = r"""Turn LLaVA records and an image folder into indexed files for training.

    %(prog)s --input train.json --image-folder images --output-prefix data/train \
        --tokenizer-model vicuna-7b --chat-template vicuna_v1 --workers 8

writes data/train.bin, .idx, _loss_mask.*, _images.*, _image_refs.*, _image_sizes.npy and .manifest.json, which
`--data-path data/train` reads. Records that cannot be used are listed with a reason in data/train.report.jsonl.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", type=Path, metavar="FILE", help="LLaVA records, .json or .jsonl")
    parser.add_argument("--image-folder", metavar="FOLDER", help="folder that the records' image paths start from")
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
    if not 0 < args.max_image_pixels <= HIGHEST_MAX_PIXELS:
        raise ValueError(f"--max-image-pixels must be 1 to {HIGHEST_MAX_PIXELS}, got {args.max_image_pixels}")
    settings = ProcessorSettings(
        tokenizer_model=args.tokenizer_model,
        chat_template=args.chat_template,
        image_folder=args.image_folder,
        max_image_pixels=args.max_image_pixels,
        vocab_size=args.vocab_size,
    )
    overrides: dict[tuple[str, ...], Any] = {
        tuple(name.split(".")): value for name, value in vars(args).items() if name.startswith("model.")
    }
    if args.model is None:
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


def preprocess(args: argparse.Namespace) -> int:
    """Run the tool; returns the exit status.

    Raises:
        ValueError: the input, the tokenizer or the template cannot be used at all.
    """
    started = time.monotonic()
    settings = settings_from(args)
    processor = RecordProcessor(settings)
    total, records = read_records(args.input)
    report_path = Path(f"{args.output_prefix}{REPORT_SUFFIX}")
    report_path.parent.mkdir(parents=True, exist_ok=True)
    bad: list[BadRecord] = []
    tqdm.monitor_interval = 0  # no thread beside the processes
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with PrefixWriter(args.output_prefix) as writer:
        results = process_in_order(records, processor, settings, args.workers)
        for result in tqdm(results, total=total, unit=" records", mininterval=interval, file=sys.stderr):
            if isinstance(result, BadRecord):
                bad.append(result)
            else:
                writer.add(result, processor.tokenizer.placeholder_ids)
        _write_report(bad, report_path)
        reasons = Counter(record.reason for record in bad)
        if bad:
            print(f"{len(bad)} of {total} records cannot be used; see {report_path}", file=sys.stderr)
            for reason, count in reasons.most_common():
                print(f"  {reason}: {count}", file=sys.stderr)
        if bad and not args.skip_bad_records:
            print("Nothing was written. Repair these records, or skip them with --skip-bad-records.", file=sys.stderr)
            return 1
        if writer.num_samples == 0:
            raise ValueError(f"{args.input} has no usable record")
        manifest = writer.finish(processor, dict(reasons))
    _print_summary(manifest, args.output_prefix, time.monotonic() - started)
    return 0


def _write_report(bad: list[BadRecord], path: Path) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in bad]
    aside.write_text("".join(lines), encoding="utf-8")
    os.replace(aside, path)


def _print_summary(manifest: Manifest, prefix: str, seconds: float) -> None:
    counts = manifest.counts
    skipped = sum(manifest.skipped.values())
    print(f"{prefix}: {counts.samples} samples in {seconds:.1f} s ({counts.samples / seconds:.0f} per second)")
    print(f"  left out     {skipped}" + (f", see {prefix}{REPORT_SUFFIX}" if skipped else ""))
    print(f"  tokens       {counts.tokens} (an image counted as one), {counts.loss_tokens} of them trained")
    megabytes = counts.image_bytes / 1e6
    print(f"  images       {counts.images} distinct ({megabytes:.1f} MB), used {counts.image_references} times")
    print(f"  text only    {counts.text_only_samples} samples")
    print(f"  longest      {counts.longest_sample} tokens; largest token id {counts.largest_token_id}")
    print(f"  files        {prefix}{{{','.join(manifest.files)}}}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 1 if records cannot be used, 2 if input, tokenizer or template cannot be used at all.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    check_words(parser, args)
    try:
        return preprocess(args) if args.data_config is None else preprocess_mixture(parser, words, preprocess)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
