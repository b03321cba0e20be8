"""Records through a processor, in this process or in several; the result is the same."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

from megatron_haplovl.data.preprocess import BadRecord, ProcessedSample, ProcessorSettings, RecordProcessor
from megatron_haplovl.data.records import RawRecord

_CHUNK = 32  # records that a worker gets at once
_WAITING = 8  # chunks per worker that may be on their way

Result = ProcessedSample | BadRecord


class _Worker:
    """A process's own processor, built once by the pool's initializer."""

    processor: RecordProcessor

    @classmethod
    def start(cls, settings: ProcessorSettings) -> None:
        cls.processor = RecordProcessor(settings)

    @classmethod
    def run(cls, chunk: list[RawRecord]) -> list[Result]:
        return [cls.processor.process(raw) for raw in chunk]


def process_in_order(
    records: Iterable[RawRecord], processor: RecordProcessor, settings: ProcessorSettings, workers: int
) -> Iterator[Result]:
    """Process all records; results come in the order of the records, no matter which worker is faster."""
    if workers == 1:
        yield from map(processor.process, records)
        return
    # The tokenizer would warn about its own threads in a forked process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    remaining = iter(records)
    waiting: deque[Future[list[Result]]] = deque()
    # Forking is quick, and safe here: nothing has started a thread yet.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_Worker.start, initargs=(settings,)) as pool:
        try:
            while True:
                while len(waiting) < workers * _WAITING and (chunk := list(islice(remaining, _CHUNK))):
                    waiting.append(pool.submit(_Worker.run, chunk))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
