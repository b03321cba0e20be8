"""`haplovl-preprocess --data-config MIX.yaml`: all sources of a mixture, each as if it were given alone."""

from __future__ import annotations

import argparse
import glob
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_haplovl.config.mixture import Mixture, MixtureSource
from megatron_haplovl.config.mixture_file import read_mixture
from megatron_haplovl.data.chat_template import load_chat_template
from megatron_haplovl.data.manifest import FORMAT_VERSION, MANIFEST_SUFFIX, read_manifest
from megatron_haplovl.data.tokenizer import load_tokenizer

RECORD_SUFFIX = ".made_from.json"
"""Beside the files of a prefix: what a mixture made them of."""

_OF_A_SOURCE = {"--input": "input", "--output-prefix": "output_prefix"}
_NEEDED = {**_OF_A_SOURCE, "--chat-template": "chat_template"}
# Options that the files do not depend on.
_ASIDE = ("workers", "data_config", "data_var")


def add_mixture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data-config and --data-var."""
    group = parser.add_argument_group("a mixture", "the sources that training reads by the same file")
    group.add_argument(
        "--data-config",
        metavar="YAML",
        help="preprocess all sources of this file that have an input, in place of --input and --output-prefix; what is "
        "up to date is skipped, and other flags are for every source that does not say it itself",
    )
    group.add_argument(
        "--data-var", nargs="+", default=[], metavar="NAME=VALUE", help="what ${NAME} stands for in the file's paths"
    )


def check_words(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Require what a single source needs, or refuse what a mixture says itself; ends the program like argparse."""
    if args.data_config is None:
        missing = [flag for flag, name in _NEEDED.items() if getattr(args, name) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
        if args.data_var:
            parser.error("--data-var is for the paths of --data-config")
        return
    for flag, name in _OF_A_SOURCE.items():
        if getattr(args, name) is not None:
            parser.error(f"--data-config {args.data_config} names the sources; leave out {flag}")


def preprocess_mixture(
    parser: argparse.ArgumentParser, words: Sequence[str], run: Callable[[argparse.Namespace], int]
) -> int:
    """Preprocess every source that has an input and is not up to date.

    Args:
        parser: of a single source.
        words: of the command line, --data-config among them.
        run: preprocesses a single source and returns the exit status, whatever happens.

    Returns:
        0 if all of them are there; otherwise the first other status. A source that cannot be used (1, 2) does not keep
        the others from their turn; whatever else ends one ends all.

    Raises:
        ValueError: the mixture cannot be read, or a source of it lacks a setting.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_mixture_arguments(own)
    given, common = own.parse_known_args(list(words))
    mixture = read_mixture(given.data_config, given.data_var, os.environ)
    jobs = {source.name: _job(parser, common, source, mixture) for source in _once(mixture) if source.input}
    for name, args in jobs.items():
        if args.chat_template is None:
            raise ValueError(f"{mixture.file}: {name} has no template; add one, or give --chat-template for all")
    failed: dict[str, int] = {}
    for name, args in jobs.items():
        reason = _why_up_to_date(args)
        if reason is not None:
            print(f"{name}: {args.output_prefix} is up to date ({reason})")
            continue
        print(f"{name}: {shlex.join(map(str, _paths(args.input)))} -> {args.output_prefix}")
        status = run(args)
        if status not in (0, 1, 2):
            return status
        if status:
            failed[name] = status
        else:
            _record_path(args).write_text(json.dumps(_made_from(args), indent=1) + "\n", encoding="utf-8")
    if failed:
        print(f"{len(failed)} of {len(jobs)} sources are not preprocessed: {', '.join(failed)}", file=sys.stderr)
    return next(iter(failed.values()), 0)


def _job(
    parser: argparse.ArgumentParser, common: Sequence[str], source: MixtureSource, mixture: Mixture
) -> argparse.Namespace:
    args = parser.parse_args([*common, *words_of(source, mixture)])
    if source.image_folder is not None:
        # Otherwise those of the command line would be searched, too.
        args.image_folder = [mixture.fill(source.image_folder, source)]
    return args


def words_of(source: MixtureSource, mixture: Mixture) -> list[str]:
    """What a source says of its preprocessing, as words of a command line.

    Raises:
        ValueError: a variable that is not set.
    """
    words = ["--input", *(mixture.fill(path, source) for path in source.input)]
    words += ["--output-prefix", mixture.prefix(source)]
    for flag, value in (
        ("--chat-template", source.template),
        ("--repairs", source.repairs),
        ("--num-frames", source.num_frames),
    ):
        if value is not None:
            words += [flag, mixture.fill(str(value), source)]
    return words


def _once(mixture: Mixture) -> list[MixtureSource]:
    """Sources by prefix: one may be read by several sections.

    Raises:
        ValueError: two sources would make one prefix in different ways.
    """
    found: dict[str, MixtureSource] = {}
    for source in mixture.sources():
        other = found.setdefault(mixture.prefix(source), source)
        if source.input and other.input and words_of(source, mixture) != words_of(other, mixture):
            raise ValueError(f"{source.where}: {other.where} makes the same prefix {mixture.prefix(source)} of others")
        if not other.input:
            found[mixture.prefix(source)] = source
    return list(found.values())


def _why_up_to_date(args: argparse.Namespace) -> str | None:
    """Why the files of a prefix need not be made again, or None."""
    prefix = args.output_prefix if args.part is None else args.part.prefix(args.output_prefix)
    if not Path(prefix + MANIFEST_SUFFIX).exists():
        return None
    try:
        manifest = read_manifest(prefix)
    except ValueError:
        return None
    template = load_chat_template(args.chat_template)
    made_of = (manifest.format_version, manifest.tokenizer_fingerprint, manifest.chat_template_sha256)
    if made_of != (FORMAT_VERSION, load_tokenizer(args.tokenizer_model).fingerprint, template.sha256):
        return None
    if not _record_path(args).exists():
        return "its tokenizer and template are these; made otherwise, so nothing is known of its input"
    made_from = json.loads(_record_path(args).read_text(encoding="utf-8"))
    return "made from the same files and settings" if made_from == _made_from(args) else None


def _record_path(args: argparse.Namespace) -> Path:
    prefix = args.output_prefix if args.part is None else args.part.prefix(args.output_prefix)
    return Path(prefix + RECORD_SUFFIX)


def _made_from(args: argparse.Namespace) -> dict[str, Any]:
    """All that a source's files are made of, images left out, in JSON's types."""
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in _files(args.input)}
    settings = {name: value for name, value in vars(args).items() if name not in _ASIDE}
    made_from: dict[str, Any] = json.loads(json.dumps({"files": files, "settings": settings}, default=_plain))
    return made_from


def _plain(value: Any) -> Any:
    # The order of a set is another in every process.
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _paths(given: Any) -> list[str]:
    return [str(path) for path in given] if isinstance(given, list) else [str(given)]


def _files(given: Any) -> list[Path]:
    """The files behind paths, folders and globs; what is not there is for the readers to say."""
    found = [Path(match) for path in _paths(given) for match in sorted(glob.glob(path, recursive=True))]
    nested = [inner for path in found if path.is_dir() for inner in sorted(path.rglob("*"))]
    return [path for path in (*found, *nested) if path.is_file()]
