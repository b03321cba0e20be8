"""`haplovl-inspect`: look at a sample of preprocessed data, or at the numbers of a whole prefix."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_haplovl.config.cli import add_settings, build_config
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import Config
from megatron_haplovl.config.validate import validate_model
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.inspection.page import sample_page
from megatron_haplovl.data.inspection.statistics import collect_statistics
from megatron_haplovl.data.inspection.statistics_report import show_statistics, statistics_page
from megatron_haplovl.data.inspection.terminal import harmless, show_sample
from megatron_haplovl.data.inspection.view import SampleView, view_sample
from megatron_haplovl.data.loader import build_loader
from megatron_haplovl.data.sources import IndexedSource
from megatron_haplovl.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_haplovl.data.tokenizer_fingerprint import same_tokenizer, shorten

_DESCRIPTION = """Look at preprocessed data.

    %(prog)s data/train --model haplovl-7b --tokenizer-model vicuna-7b --sample 17 --html sample.html

prints a sample, its trained text in colour, and writes a page with its text, its images with tiles, patches and
newlines, and its mask;

    %(prog)s data/train data/valid --model haplovl-7b --statistics --html statistics.html

counts lengths, tiles, trained tokens, repairs and bad records.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="names of the files, as --data-path takes them")
    parser.add_argument("--model", required=True, choices=sorted(MODELS), help="the model that is to see the images")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page, complete in itself")
    parser.add_argument("--statistics", action="store_true", help="numbers of whole prefixes instead of a sample")
    sample = parser.add_argument_group("a sample")
    sample.add_argument("--sample", type=int, default=0, metavar="N", help="its number (default: %(default)s)")
    sample.add_argument(
        "--tokenizer-model", metavar="PATH", help="the tokenizer of the data, which turns token ids into text again"
    )
    sample.add_argument(
        "--pack",
        action="store_true",
        help="also show the pack that holds the sample where a run trains on this prefix alone; the page draws it",
    )
    sample.add_argument("--seq-length", type=int, metavar="N", help="of that run (default: from --model)")
    sample.add_argument("--seed", type=int, metavar="N", help="of that run (default: the training's)")
    sample.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="default: where the output is a terminal"
    )
    add_settings(parser, VisionConfig, ("model", "vision"))
    return parser


def _config(args: argparse.Namespace) -> Config:
    overrides: dict[tuple[str, ...], Any] = {
        tuple(name.split(".")): value for name, value in vars(args).items() if name.startswith("model.")
    }
    for name, path in (("seq_length", ("data", "seq_length")), ("seed", ("run", "seed"))):
        if getattr(args, name) is not None:
            overrides[path] = getattr(args, name)
    config = build_config("finetune", args.model, overrides)
    validate_model(config.model)
    return config


def _show_statistics(args: argparse.Namespace, config: Config) -> None:
    found = [collect_statistics(prefix, config.model.vision) for prefix in args.prefixes]
    print("\n\n".join(map(show_statistics, found)))
    if args.html is not None:
        args.html.write_text(statistics_page(found), encoding="utf-8")


def _show_sample(args: argparse.Namespace, config: Config) -> None:
    if len(args.prefixes) != 1:
        raise ValueError(f"a sample is of one prefix, {len(args.prefixes)} are given; or give --statistics")
    if args.tokenizer_model is None:
        raise ValueError("--tokenizer-model is needed to show the text of a sample")
    (prefix,) = args.prefixes
    source, tokenizer = IndexedSource(prefix), load_tokenizer(args.tokenizer_model)
    recorded, samples = source.manifest.tokenizer_fingerprint, source.manifest.counts.samples
    if not same_tokenizer(recorded, tokenizer.fingerprint):
        raise ValueError(
            f"{prefix} was preprocessed with another tokenizer (fingerprint {shorten(recorded)}) than "
            f"--tokenizer-model {args.tokenizer_model} ({shorten(tokenizer.fingerprint)})"
        )
    if not 0 <= args.sample < samples:
        raise ValueError(f"{prefix} has the samples 0 to {samples - 1}, not {args.sample}")
    view = view_sample(source, args.sample, tokenizer, config.model)
    is_coloured = sys.stdout.isatty() if args.color == "auto" else args.color == "always"
    print(show_sample(view, is_coloured=is_coloured))
    title, pack = _pack(args, config, source, tokenizer) if args.pack else ("", [])
    if pack:
        print(f"\n{title}:")
        for document in pack:
            print(f"  {harmless(document.title)}: {document.summary}")
    if args.html is not None:
        args.html.write_text(sample_page(view, config.model.vision, pack, title), encoding="utf-8")


def _pack(
    args: argparse.Namespace, config: Config, source: IndexedSource, tokenizer: TextTokenizer
) -> tuple[str, list[SampleView]]:
    """The pack that holds the sample in the first epoch: what it is, and its documents."""
    packs = build_loader((source.name,), config, num_steps=1, dp_rank=0, dp_size=1).plan
    for number in range(packs.num_packs):
        samples = [sample for document in packs.documents(number) for _, sample in document]
        if args.sample in samples:
            title = f"pack {number}, {config.data.seq_length} tokens long, seed {config.run.seed}"
            return title, [view_sample(source, sample, tokenizer, config.model) for sample in samples]
    raise ValueError(f"{source.name}: sample {args.sample} is in no pack of the first epoch")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 2 if there is nothing to show.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        config = _config(args)
        (_show_statistics if args.statistics else _show_sample)(args, config)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
