"""Four million samples: how long a run takes to start and to resume, and how evenly its sequences are dealt.

    python benchmarks/data_scale.py [--json PATH] [--folder DIR] [--samples N]

The data are synthetic files of preprocessed samples. Their indices, sizes and counts are those of real data (four of
five samples have an image of any size, the texts are lognormal); tokens and images themselves are holes in sparse
files, because no step is made. Each start is a process of its own. Beside its time stands how long the machine takes
to read the same arrays once, as a plain copy in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import print_table, write_json
from megatron_haplovl.config.batch_schedule import BatchSchedule
from megatron_haplovl.config.cli import build_config
from megatron_haplovl.config.schema import Config
from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.manifest import Counts, FileEntry, Manifest
from megatron_haplovl.data.plan.dealing import deal
from megatron_haplovl.data.plan.epoch import BlendedSource, PlanSettings, build_epoch
from megatron_haplovl.data.plan.packs import COUNT_NAMES, PackPlan, StepPlan
from megatron_haplovl.data.sources import SampleCounts

SAMPLES, RESUMED_STEP = 4_000_000, 300_000
SHARE_WITH_IMAGE, IMAGE_BYTES = 0.8, 60_000
IMAGE_TOKEN, VIDEO_TOKEN = 150_000, 150_001


def write_scale_prefix(prefix: Path, samples: int, seed: int = 0) -> None:
    """Write files of a prefix that look like preprocessed data as far as a plan reads them."""
    random = np.random.default_rng(seed)
    has_image = random.random(samples) < SHARE_WITH_IMAGE
    images = int(has_image.sum())
    text = text_lengths(samples, random)
    sizes_I2 = np.clip(np.exp(random.normal(6.3, 0.5, (images, 2))), 32, 4096).astype(np.int32)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = (text + has_image).astype(np.int64)
    _write_pair(prefix, names.TOKENS, np.int32, lengths)
    _write_pair(prefix, names.LOSS_MASK, np.uint8, lengths)
    _write_pair(prefix, names.IMAGES, np.uint8, np.full(images, IMAGE_BYTES))
    _write_pair(prefix, names.IMAGE_REFS, np.int32, has_image.astype(np.int64))
    np.arange(images, dtype=np.int32).tofile(f"{prefix}{names.IMAGE_REFS}.bin")
    arrays: dict[str, np.ndarray[Any, Any]] = {
        names.IMAGE_SIZES: sizes_I2,
        names.IMAGE_DIGESTS: np.zeros((images, 32), dtype=np.uint8),
        names.SAMPLE_LM_TOKENS: (text // 2).astype(np.int32),
        names.SAMPLE_HASHES: random.integers(0, 2**63, samples).astype(np.uint64),
    }
    for suffix, array in arrays.items():
        np.save(f"{prefix}{suffix}", array)
    counts = Counts(
        samples=samples,
        text_only_samples=samples - images,
        tokens=int(lengths.sum()),
        loss_tokens=int((text // 2).sum()),
        image_references=images,
        images=images,
        image_bytes=images * IMAGE_BYTES,
        longest_sample=int(lengths.max()),
        largest_token_id=0,
    )
    files = {suffix: FileEntry(Path(f"{prefix}{suffix}").stat().st_size, "") for suffix in names.DATA_SUFFIXES}
    Manifest(names.FORMAT_VERSION, "", IMAGE_TOKEN, VIDEO_TOKEN, "", "", counts, {}, files).write(
        Path(f"{prefix}{names.MANIFEST_SUFFIX}")
    )


def text_lengths(samples: int, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Text tokens of each sample: skewed, with a median of 150 and at most 1,400."""
    return np.clip(random.lognormal(np.log(150), 0.9, samples), 8, 1400).astype(np.int64)


def _write_pair(prefix: Path, part: str, dtype: Any, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """The index of sequences, and a file of their size without contents."""
    code = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4}[np.dtype(dtype)]
    ends = np.cumsum(lengths) * np.dtype(dtype).itemsize
    with Path(f"{prefix}{part}.bin").open("wb") as data:
        data.truncate(int(ends[-1]))
    with Path(f"{prefix}{part}.idx").open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([code]))
        index.write(np.array([len(lengths), len(lengths) + 1], "<u8").tobytes())
        index.write(lengths.astype("<i4").tobytes())
        index.write((ends - lengths * np.dtype(dtype).itemsize).astype("<i8").tobytes())
        index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def scale_config(prefix: Path, unit: str, step: int) -> Config:
    """The run that is started: any resolution, sequences of 6,144 tokens, a batch of 128."""
    values: dict[tuple[str, ...], Any] = {
        ("data", "data_path"): (str(prefix),),
        ("data", "num_workers"): 0,
        ("schedule", "batch_unit"): unit,
        ("schedule", "train_iters"): step + 1,
    }
    return build_config("finetune", "haplovl-8b", values)


_START = """
import json, sys, time
from pathlib import Path
from benchmarks.data_scale import scale_config
from benchmarks.measure import _status_kib
from megatron_haplovl.data.loader import build_loader
import pickle
prefix, unit, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = scale_config(prefix, unit, step)
before = _status_kib("VmRSS")
started = time.perf_counter()
loader = build_loader(config.data.data_path, config, num_steps=step + 1, dp_rank=1, dp_size=8, is_builder=True)
consumed = loader.counts_before(step)
loader._sampler.first_step = step
packs = next(iter(loader._sampler))
documents = [loader._plan.packs.documents(pack) for pack in packs]
seconds = time.perf_counter() - started
anonymous = _status_kib("RssAnon")
print(json.dumps({
    "seconds": seconds, "peak MiB": (_status_kib("VmHWM") - before) / 1024, "own MiB": anonymous / 1024,
    "dataset pickled, bytes": len(pickle.dumps(loader._loader.dataset)), "consumed tokens": consumed.tokens,
    "epochs": len(loader._plan.packs.epochs), "sequences of a step": max(loader._plan.most_packs.sizes),
}))
"""


def measure_starts(folder: Path, samples: int) -> list[dict[str, Any]]:
    """First start, later start, and resuming, each in a process of its own; counted in packs and in samples.

    Args:
        folder: where the files are written, 1 GB for four million samples (and as much that is sparse).
        samples: how many.
    """
    prefix = folder / f"scale_{samples}"
    if not Path(f"{prefix}{names.MANIFEST_SUFFIX}").exists():
        write_scale_prefix(prefix, samples)
    plan_reads = [f"{prefix}{part}.idx" for part in (names.TOKENS, names.LOSS_MASK, names.IMAGE_REFS)]
    plan_reads += [
        f"{prefix}{names.IMAGE_REFS}.bin",
        f"{prefix}{names.IMAGE_SIZES}",
        f"{prefix}{names.SAMPLE_LM_TOKENS}",
    ]
    records = []
    for unit, last in (("packs", 0), ("samples", 0), ("samples", RESUMED_STEP)):
        for start in ("first", "later"):
            command = [sys.executable, "-c", _START, str(prefix), unit, str(last)]
            output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=_ROOT).stdout
            started = time.perf_counter()
            size = sum(np.fromfile(path, dtype=np.uint8).copy().nbytes for path in plan_reads)
            found = {"unit": unit, "step": last, "start": start, **json.loads(output.splitlines()[-1])}
            records.append(
                {**found, "arrays read MiB": size / 2**20, "read and copied, s": time.perf_counter() - started}
            )
    return records


_ROOT = Path(__file__).resolve().parents[1]


def measure_dealing(samples: int = 200_000) -> list[dict[str, Any]]:
    """Max over mean of what the ranks of a step have to do, with sequences in the plan's order and dealt by cost."""
    random = np.random.default_rng(0)
    records = []
    for seq_length in (6144, 32768):
        counts = image_and_text_counts(samples, random)
        source = BlendedSource("scale", 1.0, counts)
        settings = PlanSettings(seed=0, seq_length=seq_length, packing=True, shuffle=True, skip_long_samples=False)
        plan = StepPlan(PackPlan([build_epoch([source], [], settings, 0)]), BatchSchedule(256))
        for ranks in (8, 64):
            sums: dict[str, list[float]] = {}
            for step in range(plan.num_steps - 1):
                of_packs = plan.counts_of_packs(step)
                of_name = {name: of_packs[:, COUNT_NAMES.index(name)] for name in ("pairs", "tiles")}
                in_order = np.arange(len(of_packs)).reshape(-1, ranks)
                for how, order in (("in order", in_order), ("dealt", deal(**of_name, ranks=ranks))):
                    for name, of_pack in of_name.items():
                        values = of_pack[order].sum(axis=0)
                        sums.setdefault(f"{name}, {how}", []).append(float(values.max() / values.mean()))
            records.append(
                {
                    "seq length": seq_length,
                    "DP": ranks,
                    "sequences": 256,
                    **{name: float(np.mean(values)) for name, values in sums.items()},
                }
            )
    return records


def image_and_text_counts(samples: int, random: np.random.Generator) -> SampleCounts:
    """Sizes of samples of any resolution: none to four tiles of 576 patches, and a skewed text."""
    text = text_lengths(samples, random)
    tiles = np.where(random.random(samples) < SHARE_WITH_IMAGE, random.integers(1, 5, samples), 0)
    # The tiles of a wide picture are not full.
    patches = (tiles * 576 * random.uniform(0.6, 1.0, samples)).astype(np.int64)
    visual = patches + patches // 36
    return SampleCounts(text + visual, text, patches, text // 2, tiles, visual * (visual - 1) // 2)


def llava_counts(samples: int, random: np.random.Generator) -> SampleCounts:
    """Sizes of samples like LLaVA's: an image of 576 patches and 24 newlines, and a skewed text."""
    text = text_lengths(samples, random)
    image = np.full(samples, 600)
    one = np.ones(samples, dtype=np.int64)
    return SampleCounts(text + image, text, 576 * one, text // 2, one, image * (image - 1) // 2)


def measure_fill(samples: int = 100_000) -> list[dict[str, Any]]:
    """How full the sequences are that hold a step's samples, and how many of its sequences are empty."""
    counts = llava_counts(samples, np.random.default_rng(0))
    records = []
    for seq_length in (2048, 4096):
        for batch in (128, 256):
            settings = PlanSettings(
                0, seq_length, packing=True, shuffle=True, skip_long_samples=False, step_samples=batch
            )
            epoch = build_epoch([BlendedSource("llava", 1.0, counts)], [], settings, 0)
            largest = int(np.diff(epoch.step_offsets).max())
            tokens = int(epoch.cumulative[-1, COUNT_NAMES.index("tokens")])
            records.append(
                {
                    "seq length": seq_length,
                    "samples": batch,
                    "fill": tokens / (epoch.num_packs * seq_length),
                    "sequences": largest,
                    "of them empty": 1 - epoch.num_packs / (epoch.num_steps * largest),
                    "one sample per row": tokens / (epoch.num_steps * batch * seq_length),
                }
            )
    return records


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--folder", type=Path, help="keep the synthetic files here (default: a temporary folder)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="(default: four million)")
    arguments = parser.parse_args()
    tables = {"fill": measure_fill(), "dealing": measure_dealing()}
    with tempfile.TemporaryDirectory() as temporary:
        tables["starts"] = measure_starts(arguments.folder or Path(temporary), arguments.samples)
    for name, records in tables.items():
        print(f"\n{name}")
        print_table(records, list(records[0]))
    if arguments.json:
        write_json(arguments.json, [{"table": name, **record} for name, rows in tables.items() for record in rows])


if __name__ == "__main__":
    main()
