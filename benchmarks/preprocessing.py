"""Preprocessing: one worker against a plain loop, two against one, and how many workers the main process can serve.

    python benchmarks/preprocessing.py --folder /scratch/preprocessing --records 2000 --json preprocessing.json

Records in LLaVA's form of about its lengths, with one JPEG of 640 x 480 each, and the same without images. The plain
loop holds the records in memory, uses the same tokenizer, chat template and image decoder, and appends ids, masks and
image bytes to three files: no checks, no digests, no index. All variants are timed in turn, `--repeats` times, and the
medians of the ratios within one round are reported, because the machine's speed changes.

The main process's CPU time, system time included, is measured apart from the workers', for all records and for a
quarter of them, in parts of the default size: the difference is what records cost. The number of workers at which the
main process would be busy all the time is the workers' CPU time for a record divided by its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image as Picture

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, print_table, write_json
from megatron_haplovl.data.chat_template import ConversationEncoder, load_chat_template
from megatron_haplovl.data.image_processing import decode_image
from megatron_haplovl.data.preprocessing.parts_folder import open_parts
from megatron_haplovl.data.preprocessing.processor import ProcessorSettings, RecordProcessor
from megatron_haplovl.data.preprocessing.record_source import RecordSource
from megatron_haplovl.data.preprocessing.run import run, without_threads
from megatron_haplovl.data.preprocessing.schedule import all_spans
from megatron_haplovl.data.records import Image, Message, Record
from megatron_haplovl.data.tokenizer import load_tokenizer

DEFAULT_PART = 1024
_WORDS = re.findall(
    r"\w+",
    """a cat dog table red blue green on under beside large small man woman street car tree house window holding
looking standing two three several people image shows scene background sky light bright wooden white black""",
)


@dataclass(frozen=True)
class Corpus:
    """Records, with images or without."""

    json: Path
    images: Path
    tokenizer: Path
    records: int

    @property
    def settings(self) -> ProcessorSettings:
        """What the records are preprocessed with."""
        return ProcessorSettings(str(self.tokenizer), "vicuna_v1", (str(self.images),))


def _text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(_WORDS, size=words)) + "."


def make_corpus(folder: Path, records: int, *, with_images: bool) -> Corpus:
    """Write records of two turns of some 60 words, and an image of about 60 KB for each."""
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(records):
        turns = [
            turn
            for _ in range(2)
            for turn in (
                {"from": "human", "value": _text(rng, 12)},
                {"from": "gpt", "value": _text(rng, int(rng.integers(20, 80)))},
            )
        ]
        record: dict[str, object] = {"id": str(number), "conversations": turns}
        if with_images:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = f"{number}.jpg"
            path = images / f"{number}.jpg"
            if not path.exists():
                small = rng.integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
                Picture.fromarray(small).resize((640, 480), Picture.Resampling.BICUBIC).save(path, quality=95)
        made.append(record)
    path = folder / f"records_{records}_{with_images}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")
    model = folder / "tokenizer.model"
    if not model.exists():
        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join(_text(rng, 40) for _ in range(2000)) + "\nUSER ASSISTANT", encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(model.with_suffix("")), vocab_size=500, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return Corpus(path, images, model, records)


@dataclass(frozen=True)
class Cost:
    """Seconds of one preprocessing."""

    wall: float
    main_cpu: float
    worker_cpu: float


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def preprocess(corpus: Corpus, folder: Path, workers: int, records_per_part: int = 128) -> Cost:
    """The program's own way, its start (imports, tokenizer) not counted."""
    processor = RecordProcessor(corpus.settings)
    source = RecordSource([corpus.json], records_per_part)
    shutil.rmtree(folder, ignore_errors=True)
    prefix = str(folder / "x")
    with open_parts(prefix, {}) as (parts, _):
        before = time.perf_counter(), _cpu(resource.RUSAGE_SELF), _cpu(resource.RUSAGE_CHILDREN)
        outcome = run(
            processor, source, all_spans(source), parts, {}, prefix,
            workers=workers, skip_bad_records=False, may_be_empty=False, progress=lambda _: None,
        )  # fmt: skip
        after = time.perf_counter(), _cpu(resource.RUSAGE_SELF), _cpu(resource.RUSAGE_CHILDREN)
    assert outcome.manifest is not None and outcome.manifest.counts.samples == corpus.records
    wall, own, children = (b - a for a, b in zip(before, after, strict=True))
    return Cost(wall, own, children)


def plain_pass(corpus: Corpus, folder: Path) -> Cost:
    """A loop around the same tokenizer, template and decoder."""
    encoder = ConversationEncoder(load_tokenizer(corpus.tokenizer), load_chat_template("vicuna_v1"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started, cpu = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
    roles = {"human": "user", "gpt": "assistant"}
    with (
        (folder / "ids").open("wb") as ids,
        (folder / "mask").open("wb") as mask,
        (folder / "images").open("wb") as out,
    ):
        for line in corpus.json.open(encoding="utf-8"):
            value = json.loads(line)
            messages = []
            for turn in value["conversations"]:
                image, mark, text = turn["value"].rpartition("<image>")
                parts = (Image(path=value["image"]), text) if mark else (image + text,)
                messages.append(Message(roles[turn["from"]], parts))
            encoded = encoder.encode(Record(tuple(messages)))
            ids.write(encoded.token_ids.tobytes())
            mask.write(encoded.loss_mask.tobytes())
            if "image" in value:
                data = (corpus.images / value["image"]).read_bytes()
                decode_image(data)
                out.write(data)
    return Cost(time.perf_counter() - started, _cpu(resource.RUSAGE_SELF) - cpu, 0.0)


def measure(folder: Path, records: int, repeats: int) -> dict[str, float]:
    """All figures, as medians over the rounds."""
    without_threads()
    figures: dict[str, float] = {}
    for name, with_images in (("with images", True), ("text alone", False)):
        number = records if with_images else 4 * records
        corpora = [make_corpus(folder, count, with_images=with_images) for count in (number, number // 4)]
        rounds = [_figures_of_round(corpora[0], corpora[1], folder) for _ in range(repeats)]
        figures |= {f"{name}: {key}": statistics.median(each[key] for each in rounds) for key in rounds[0]}
    return figures


def _figures_of_round(corpus: Corpus, small: Corpus, folder: Path) -> dict[str, float]:
    plain = plain_pass(corpus, folder / "plain")
    one = preprocess(corpus, folder / "one", 1)
    two = preprocess(corpus, folder / "two", 2)
    # What starting the processes and completing the files costs is the same for any number of records.
    more, less = (preprocess(each, folder / "two", 2, DEFAULT_PART) for each in (corpus, small))
    main, workers = (
        (getattr(more, name) - getattr(less, name)) / (corpus.records - small.records)
        for name in ("main_cpu", "worker_cpu")
    )
    return {
        "plain loop, ms a record": 1e3 * plain.wall / corpus.records,
        "one worker, share of the plain loop's rate": plain.wall / one.wall,
        "the same of CPU time": plain.main_cpu / one.main_cpu,
        "two workers over one": one.wall / two.wall,
        "main process, ms of CPU at the start and the end": 1e3 * (less.main_cpu - main * small.records),
        "main process, us of CPU a record": 1e6 * main,
        "workers, us of CPU a record": 1e6 * workers,
        "workers that the main process can serve": workers / main,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder on the disk to be measured")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    figures = measure(args.folder, args.records, args.repeats)
    rows = [{"figure": name, "value": round(value, 3)} for name, value in figures.items()]
    print_table(rows, ("figure", "value"))
    meta = {**machine("cpu"), "load": os.getloadavg()[0], "records_with_images": args.records}
    print(meta)
    if args.json is not None:
        write_json(args.json, rows, **meta)


if __name__ == "__main__":
    main()
