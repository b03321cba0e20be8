"""What a prefix holds, in numbers: lengths, tiles, trained share, repairs, and records that were left out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.manifest import REPORT_SUFFIX
from megatron_haplovl.data.sources import IndexedSource

_BARS = 12


@dataclass(frozen=True)
class Histogram:
    """How many samples have how much of something."""

    title: str
    bars: tuple[tuple[str, int], ...]
    """The range of each bar, in words, and its samples."""
    note: str
    """Mean, median and largest."""


@dataclass(frozen=True)
class BadRecords:
    """Records of one reason in the report file."""

    reason: str
    number: int
    example: str
    """The first one: where it stands, and why it cannot be used."""


@dataclass(frozen=True)
class Statistics:
    """A prefix in numbers."""

    prefix: str
    facts: tuple[tuple[str, str], ...]
    """Single numbers, each with its name."""
    histograms: tuple[Histogram, ...]
    repairs: dict[str, int]
    unread_keys: dict[str, int]
    left_out: dict[str, int]
    """By reason, as the manifest counts them."""
    bad_records: tuple[BadRecords, ...]
    """As PREFIX.report.jsonl lists them, the most frequent reason first."""


def collect_statistics(prefix: str, vision: VisionConfig) -> Statistics:
    """Read the sizes of all samples, the manifest, and the report if there is one; no image and no text is read.

    Args:
        prefix: path without suffix.
        vision: how the model sees images, which decides tiles and lengths.

    Raises:
        ValueError: a file is missing or damaged.
    """
    source = IndexedSource(prefix)
    manifest, sizes = source.manifest, source.counts(vision)
    counts = manifest.counts
    trained = 100 * sizes.lm_tokens / np.maximum(sizes.text_tokens, 1)
    visual = sizes.tokens - sizes.text_tokens
    facts = {
        "samples": f"{counts.samples}",
        "without images and videos": f"{counts.text_only_samples}",
        "tokens": f"{sizes.tokens.sum()}",
        "visual tokens": f"{visual.sum()} ({100 * visual.sum() / max(sizes.tokens.sum(), 1):.1f} %)",
        "trained tokens": f"{sizes.lm_tokens.sum()} "
        f"({100 * sizes.lm_tokens.sum() / max(sizes.text_tokens.sum(), 1):.1f} % of the text)",
        "images, each once": f"{counts.images} ({counts.image_bytes / 1e6:.1f} MB)",
        "uses of images": f"{counts.image_references}",
        "videos": f"{counts.videos}",
        "tiles": f"{sizes.tiles.sum()}",
        "chat template": manifest.chat_template,
    }
    return Statistics(
        prefix,
        tuple(facts.items()),
        (
            _histogram("tokens of a sample", sizes.tokens),
            _histogram("text tokens of a sample", sizes.text_tokens),
            _histogram("tiles of a sample", sizes.tiles),
            _histogram("trained share of a sample's text (%)", trained),
        ),
        manifest.repairs,
        manifest.unread_keys,
        manifest.skipped,
        _read_report(Path(prefix + REPORT_SUFFIX)),
    )


def _histogram(title: str, values: npt.NDArray[np.integer | np.floating]) -> Histogram:
    note = f"mean {values.mean():.1f}, median {np.median(values):g}, largest {values.max():g}"
    smallest, largest = int(values.min()), int(np.ceil(values.max()))
    width = max(1, -(-(largest - smallest + 1) // _BARS))
    # Whole numbers: a bar from 5 to 9 holds 9.
    edges = np.arange(smallest, largest + width + 1, width)
    numbers, _ = np.histogram(values, bins=edges)
    names = [f"{low}" if width == 1 else f"{low}-{low + width - 1}" for low in edges[:-1].tolist()]
    return Histogram(title, tuple(zip(names, numbers.tolist(), strict=True)), note)


def _read_report(path: Path) -> tuple[BadRecords, ...]:
    if not path.is_file():
        return ()
    numbers: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                reason, example = str(entry["reason"]), f"{entry['location']}: {entry['detail']}"
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a line of a report: {error!r}") from error
            numbers[reason] += 1
            examples.setdefault(reason, example)
    return tuple(BadRecords(reason, number, examples[reason]) for reason, number in numbers.most_common())
