"""Ask an exported model one question.

haplovl-generate --model runs/haplo --image photo.png --prompt "What is in the picture?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from megatron_haplovl.evaluation.answering import load_answerer


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description="Ask an exported model one question.", allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="model in the released Haplo format")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question; <image> may mark image places")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="images, in the order of their marks")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy, above 0 samples (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the answer; a user's error ends in one line on stderr and exit status 1."""
    args = build_parser().parse_args(argv)
    try:
        if args.max_new_tokens < 1 or args.temperature < 0:
            raise ValueError("--max-new-tokens must be at least 1 and --temperature at least 0")
        answerer = load_answerer(args.model, args.device)
        set_seed(args.seed)
        images = [Path(path) for path in args.image]
        (answer,) = answerer.answer(
            [args.prompt], [images], max_new_tokens=args.max_new_tokens, temperature=args.temperature
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(answer)


if __name__ == "__main__":
    main()
