"""`haplovl-verify`: read preprocessed data to the end and compare it with its checksums."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_haplovl.data.verification import verify_prefix

_DESCRIPTION = """Compare every file of preprocessed data with its manifest, and the files with each other.

    %(prog)s data/train data/valid

prints a line for each file. The exit status is 1 if anything is wrong. Every image is read, so this takes as long as
reading the files takes.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="names of the files, as --data-path takes them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 1 if anything is wrong.
    """
    args = build_parser().parse_args(argv)
    damaged = False
    for prefix in args.prefixes:
        print(prefix)
        for finding in verify_prefix(prefix):
            print(f"  {finding.name:<32} {finding.read:>18}  {'; '.join(finding.problems) or 'good'}", flush=True)
            damaged |= bool(finding.problems)
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
