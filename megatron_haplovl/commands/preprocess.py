"""`haplovl-preprocess`: records and images -> indexed files for training, and a report of what cannot be used."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from megatron_haplovl import __version__
from megatron_haplovl.commands.preprocess_arguments import build_parser, settings_from
from megatron_haplovl.commands.preprocess_mixture import check_words, preprocess_mixture
from megatron_haplovl.data.layouts.repairs import REPAIRS
from megatron_haplovl.data.manifest import FORMAT_VERSION, REPORT_SUFFIX, Manifest
from megatron_haplovl.data.preprocessing.long_samples import CHANGES
from megatron_haplovl.data.preprocessing.parts_folder import PartsFolder, open_parts
from megatron_haplovl.data.preprocessing.processor import ProcessorSettings, RecordProcessor
from megatron_haplovl.data.preprocessing.record_source import RecordSource
from megatron_haplovl.data.preprocessing.run import Outcome, run, without_threads
from megatron_haplovl.data.preprocessing.schedule import all_spans, share_of
from megatron_haplovl.data.preprocessing.workers import WorkerGoneError

UNUSABLE_RECORDS, UNUSABLE_INPUT, WORKER_GONE, CANNOT_WRITE = 1, 2, 70, 74
"""Exit statuses. A signal ends the program with 128 and its number: 130 for SIGINT, 143 for SIGTERM."""

_NAMED_AT_MOST = 12  # keys in the summary; the manifest has all of them


class Stopped(BaseException):  # noqa: N818 - like KeyboardInterrupt, it is no error
    """A signal asks the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def preprocess(args: argparse.Namespace) -> int:
    """Run the tool; returns the exit status.

    Raises:
        ValueError: the input, the tokenizer or the template cannot be used at all.
        OSError: something cannot be written.
        WorkerGoneError: a worker process has ended.
    """
    started = time.monotonic()
    settings = settings_from(args)
    without_threads()
    source = RecordSource(args.input, args.records_per_part)
    processor = RecordProcessor(settings)
    prefix = args.output_prefix if args.part is None else args.part.prefix(args.output_prefix)
    tqdm.monitor_interval = 0  # no thread beside the processes
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with open_parts(prefix, bound_to(settings, processor, source, args)) as (folder, said):
        if said is not None:
            print(said, file=sys.stderr)
        finished = folder.finished()
        _say_what_is_there(len(finished), folder, source)
        spans = all_spans(source) if args.part is None else share_of(source, args.part.index, args.part.total)
        with tqdm(unit=" records", mininterval=interval, file=sys.stderr) as bar:
            outcome = run(
                processor,
                source,
                spans,
                folder,
                finished,
                prefix,
                workers=args.workers,
                skip_bad_records=args.skip_bad_records,
                may_be_empty=args.part is not None,
                progress=lambda done: bar.update(done.records),
            )
        _print_bad(outcome, prefix)
        if outcome.manifest is None and outcome.bad and not args.skip_bad_records:
            print(
                "Nothing was written. Repair these records, or skip them with --skip-bad-records. "
                f"What has been done is kept in {folder.path}, and the next run goes on from it.",
                file=sys.stderr,
            )
            return UNUSABLE_RECORDS
        if outcome.manifest is None:
            folder.discard()
            raise ValueError(f"{', '.join(args.input)} has no usable record")
    _print_summary(outcome.manifest, prefix, time.monotonic() - started)
    return 0


def bound_to(
    settings: ProcessorSettings, processor: RecordProcessor, source: RecordSource, args: argparse.Namespace
) -> dict[str, Any]:
    """All that parts depend on. `--workers` and `--skip-bad-records` change none of them; images are not looked at."""
    values = dataclasses.asdict(settings)
    del values["tokenizer_model"], values["chat_template"]  # their contents count, in `origin`
    for name in ("image_folders", "image_roots"):
        values[name] = [str(Path(folder).resolve()) for folder in values[name]]
    values["normalise"] = {name: sorted(names) for name, names in values["normalise"].items()}
    return {
        "program": f"{__version__}, format {FORMAT_VERSION}",
        "inputs": source.states(),
        "records_per_part": args.records_per_part,
        "part": None if args.part is None else dataclasses.asdict(args.part),
        **dataclasses.asdict(processor.origin),
        **values,
    }


def _say_what_is_there(there: int, folder: PartsFolder, source: RecordSource) -> None:
    if not there:
        return
    ends = folder.ends()
    if ends is not None:
        total = f" of {sum(ends.values())}"
    elif any(source.is_stream(file) for file in range(len(source.files))):
        total = ""
    else:
        total = f" of {sum(source.count_parts(file) for file in range(len(source.files)))}"
    print(f"continuing: {there}{total} parts are there, in {folder.path}", file=sys.stderr)


def _print_bad(outcome: Outcome, prefix: str) -> None:
    if not outcome.bad:
        return
    print(f"{outcome.bad} of {outcome.records} records cannot be used; see {prefix}{REPORT_SUFFIX}", file=sys.stderr)
    for reason, count in sorted(outcome.reasons.items(), key=lambda item: (-item[1], item[0])):
        print(f"  {reason}: {count}", file=sys.stderr)


def _print_summary(manifest: Manifest, prefix: str, seconds: float) -> None:
    counts = manifest.counts
    skipped = sum(manifest.skipped.values())
    print(f"{prefix}: {counts.samples} samples in {seconds:.1f} s ({counts.samples / seconds:.0f} per second)")
    print(f"  left out     {skipped}" + (f", see {prefix}{REPORT_SUFFIX}" if skipped else ""))
    print(f"  tokens       {counts.tokens} (an image counted as one), {counts.loss_tokens} of them trained")
    megabytes = counts.image_bytes / 1e6
    print(f"  images       {counts.images} distinct ({megabytes:.1f} MB), used {counts.image_references} times")
    if counts.videos:
        print(f"  videos       {counts.videos}, of {manifest.num_frames} frames each or fewer")
    print(f"  text only    {counts.text_only_samples} samples")
    print(f"  longest      {counts.longest_sample} tokens; largest token id {counts.largest_token_id}")
    for name, count in manifest.repairs.items():
        print(f"  repaired     {name} {count}: {(REPAIRS | CHANGES)[name]}")
    unread = sorted(manifest.unread_keys.items(), key=lambda item: -item[1])
    named = ", ".join(f"{json.dumps(name)[1:-1]} {count}" for name, count in unread[:_NAMED_AT_MOST])
    more = f" and {len(unread) - _NAMED_AT_MOST} more" if len(unread) > _NAMED_AT_MOST else ""
    print(f"  not read     {named or 'nothing'}{more}")
    if manifest.left_out:
        print(f"  not used     {', '.join(f'{name} of {count}' for name, count in manifest.left_out.items())} samples")
    print(f"  files        {prefix}{{{','.join(manifest.files)}}}")


def _stop(number: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the cleaning up.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 1 if records cannot be used; 2 if input, tokenizer or template cannot be used at all; 70 if a
        worker process was killed; 74 if something cannot be written; 130 and 143 after SIGINT and SIGTERM.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    check_words(parser, args)
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if args.data_config is None:
            return _preprocess_in_one_sentence(parser.prog, args)
        return preprocess_mixture(parser, words, partial(_preprocess_in_one_sentence, parser.prog))
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return UNUSABLE_INPUT
    except Stopped as stop:
        # Between two sources of a mixture.
        print(f"{parser.prog}: stopped by {signal.Signals(stop.number).name}", file=sys.stderr)
        return 128 + stop.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _preprocess_in_one_sentence(program: str, args: argparse.Namespace) -> int:
    """As :func:`preprocess`; whatever ends it is said in one sentence."""
    try:
        return preprocess(args)
    except ValueError as error:
        message, status, goes_on = str(error), UNUSABLE_INPUT, False
    except WorkerGoneError as error:
        message, status, goes_on = str(error), WORKER_GONE, True
    except OSError as error:
        message, status, goes_on = f"{error.filename or args.output_prefix}: {error.strerror}", CANNOT_WRITE, True
    except Stopped as stop:
        message, status, goes_on = f"stopped by {signal.Signals(stop.number).name}", 128 + stop.number, True
    if goes_on:
        message += what_is_kept(args)
    print(f"{program}: {'error: ' if status != 128 + signal.SIGINT else ''}{message}", file=sys.stderr)
    return status


def what_is_kept(args: argparse.Namespace) -> str:
    """The end of a sentence, for a run that did not come to its end."""
    prefix = args.output_prefix if args.part is None else args.part.prefix(args.output_prefix)
    folder = PartsFolder(Path(f"{prefix}.parts"))
    parts = len(folder.names())
    if not parts:
        return "; nothing was written"
    return f"; {parts} parts are kept in {folder.path}, and the same command goes on from them"


if __name__ == "__main__":
    sys.exit(main())
