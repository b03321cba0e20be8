"""`haplovl-merge`: preprocessed prefixes -> one prefix, images that are alike stored once."""

from __future__ import annotations

import argparse
import glob
import re
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from megatron_haplovl.data.manifest import MANIFEST_SUFFIX, REPORT_SUFFIX, Manifest, read_manifest
from megatron_haplovl.data.preprocessing.merge import PrefixJoiner, join_reports, publish

_DESCRIPTION = r"""Join preprocessed prefixes, such as the shares that several machines made:

    haplovl-preprocess ... --output-prefix data/train --part 0/4        # and 1/4, 2/4, 3/4 on other machines
    %(prog)s --input-prefix 'data/train-*-of-00004' --output-prefix data/train

The samples stand one behind the other in the order of the prefixes. The files are those of one preprocessing of
everything. Prefixes of other tokenizers, chat templates or numbers of frames are refused.
"""
_SHARE = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})")


def build_parser() -> argparse.ArgumentParser:
    """All flags of the tool."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input-prefix", required=True, nargs="+", metavar="PREFIX", help="prefixes to join, in order")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="names of the files to write")
    return parser


def find_prefixes(given: Sequence[str]) -> list[str]:
    """The prefixes; a pattern stands for all that match, in the order of their names.

    Raises:
        ValueError: a pattern matches none, a prefix is there twice, or of several shares one is missing or out of
            order.
    """
    prefixes: list[str] = []
    for word in given:
        found = sorted(glob.glob(word + MANIFEST_SUFFIX)) if glob.has_magic(word) else [word + MANIFEST_SUFFIX]
        if not found:
            raise ValueError(f"no prefix matches {word!r}")
        prefixes += [path.removesuffix(MANIFEST_SUFFIX) for path in found]
    for number, prefix in enumerate(prefixes):
        if prefix in prefixes[:number]:
            raise ValueError(f"{prefix} is given twice")
    first = _SHARE.fullmatch(prefixes[0])
    if first is not None and all(map(_SHARE.fullmatch, prefixes)):
        expected = [f"{first[1]}-{number:05d}-of-{first[3]}" for number in range(int(first[3]))]
        for want, have in zip_longest(expected, prefixes):
            if want != have:
                raise ValueError(f"{want or 'the end'} is expected, not {have or 'the end'}; give all shares in order")
    return prefixes


def merge(prefixes: Sequence[str], output: str) -> Manifest:
    """Join prefixes.

    Raises:
        ValueError: a prefix is missing or damaged, or does not fit the others.
        OSError: something cannot be written.
    """
    if output in prefixes:
        raise ValueError(f"{output} is both an input and the output")
    manifests = [read_manifest(prefix) for prefix in prefixes]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    folder = Path(f"{output}.merging")
    # Of a merge that was killed.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with PrefixJoiner(folder / "part") as joiner:
            for prefix, manifest in zip(prefixes, manifests, strict=True):
                joiner.add(prefix, manifest)
            joined = joiner.finish()
        join_reports(prefixes, Path(f"{output}{REPORT_SUFFIX}"))
        publish(folder / "part", output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return joined


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 2 if the prefixes cannot be joined, 74 if something cannot be written.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        prefixes = find_prefixes(args.input_prefix)
        manifest = merge(prefixes, args.output_prefix)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: error: {error.filename or args.output_prefix}: {error.strerror}", file=sys.stderr)
        return 74
    counts, seconds = manifest.counts, time.monotonic() - started
    print(f"{args.output_prefix}: {counts.samples} samples of {len(prefixes)} prefixes in {seconds:.1f} s")
    print(f"  images       {counts.images} distinct ({counts.image_bytes / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
