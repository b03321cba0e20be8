"""Flags of `haplovl-preprocess` about its input: files, image folders, repairs."""

from __future__ import annotations

import argparse

from megatron_haplovl.data.normalise import NormaliseOptions
from megatron_haplovl.data.repairs import REPAIRS, parse_repairs


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """What is read, and how strictly."""
    parser.add_argument(
        "--input",
        required=True,
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
