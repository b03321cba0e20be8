"""A whole preprocessing: parts are made by workers, and joined here while they are being made."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from megatron_haplovl.data.manifest import REPORT_SUFFIX, Manifest, read_manifest
from megatron_haplovl.data.preprocessing.merge import PrefixJoiner, join_reports, publish
from megatron_haplovl.data.preprocessing.parts_folder import PartDone, PartsFolder
from megatron_haplovl.data.preprocessing.processor import RecordProcessor
from megatron_haplovl.data.preprocessing.record_source import RecordSource
from megatron_haplovl.data.preprocessing.schedule import Schedule, Span
from megatron_haplovl.data.preprocessing.workers import Crew, OneProcess, PartMaker, Workers


@dataclass
class Outcome:
    """What became of the records."""

    records: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Records that cannot be used, by reason."""
    manifest: Manifest | None = None
    """None if nothing was written: there are bad records that are not to be skipped, or no good ones."""


def run(
    processor: RecordProcessor,
    source: RecordSource,
    spans: list[Span],
    folder: PartsFolder,
    finished: dict[str, PartDone],
    prefix: str,
    *,
    workers: int,
    skip_bad_records: bool,
    may_be_empty: bool,
    progress: Callable[[PartDone], object],
) -> Outcome:
    """Make all parts that are not there, join them to a prefix, and write the report.

    The folder of parts is removed when the prefix is complete, and kept otherwise.

    Args:
        processor: what makes samples of records.
        source: the records.
        spans: which of them.
        folder: the parts.
        finished: those that are there.
        prefix: the prefix to write.
        workers: number of processes; 1 is this one.
        skip_bad_records: leave out records that cannot be used. Without it, parts that have some are made again,
            because their images may have been mended.
        may_be_empty: whether files without samples are written, too.
        progress: is told of each part that was there or has been made.

    Raises:
        ValueError: the input or the parts are damaged.
        OSError: something cannot be written.
        WorkerGoneError: a worker process has ended.
    """
    if not skip_bad_records:
        for name in [name for name, done in finished.items() if done.bad]:
            folder.remove(name)
        finished = {name: done for name, done in finished.items() if not done.bad}
    for done in finished.values():
        progress(done)
    schedule = Schedule(source, spans, finished, folder.ends())
    maker = PartMaker(processor, source, folder)
    crew: Crew = OneProcess(maker) if workers == 1 else Workers(maker, workers)
    outcome, parts = Outcome(), list[str]()
    with ExitStack() as stack:
        # Before the files are opened: a worker would inherit them.
        stack.enter_context(crew)
        aside = folder.begin_joining()
        joiner = stack.enter_context(PrefixJoiner(aside, processor.origin))
        while not schedule.is_over:
            while crew.has_room and (part := schedule.next_to_make()):
                crew.give(part)
            done_next = schedule.next_to_join()
            if done_next is None and schedule.is_over:
                break
            assert done_next is not None or not crew.is_idle
            for done in crew.poll(block=done_next is None):
                progress(done)
                schedule.add(done)
            if done_next is not None:
                parts.append(folder.prefix(done_next.name))
                _join(joiner, parts[-1], done_next, outcome, skip_bad_records)
        folder.write_ends(schedule.ends)
        join_reports(parts, Path(f"{prefix}{REPORT_SUFFIX}"))
        if (outcome.bad and not skip_bad_records) or (joiner.num_samples == 0 and not may_be_empty):
            return outcome
        outcome.manifest = joiner.finish()
    publish(aside, prefix)
    folder.discard()
    return outcome


def _join(joiner: PrefixJoiner, prefix: str, done: PartDone, outcome: Outcome, skip_bad_records: bool) -> None:
    manifest = read_manifest(prefix)
    outcome.records += done.records
    outcome.bad += done.bad
    outcome.reasons.update(manifest.skipped)
    if skip_bad_records or not outcome.bad:
        joiner.add(prefix, manifest)


def without_threads() -> None:
    """Tokenizers must not start threads, because workers are forked. Call it before one is loaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
